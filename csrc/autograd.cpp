// Autograd of the ops that return gradients together with their value: the backward scales them.
// `_library.py` says which arguments they belong to, and does the same in Python where this library was not
// built.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

namespace robustloss {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

/// An op and its arguments, the last on the stack.
struct Call {
    const c10::OperatorHandle& op;
    c10::DispatchKeySet keys;
    Stack& stack;

    auto arguments() const { return torch::jit::last(stack, op.schema().arguments().size()); }

    /// Leaves the outputs on the stack instead.
    void run() const {
        at::AutoDispatchBelowAutograd below_autograd;
        op.redispatchBoxed(keys & c10::after_autograd_keyset, &stack);
    }
};

template <size_t sides>
struct ScaledGradients : torch::autograd::Function<ScaledGradients<sides>> {
    /// The call's first output. `samples` are those of its first 2 * sides arguments that are not None.
    static Tensor forward(AutogradContext* ctx, at::TensorList /*samples*/, const Call& call) {
        const std::vector<IValue> arguments = call.arguments().vec();
        call.run();
        const auto outputs = torch::jit::last(call.stack, call.op.schema().returns().size());
        variable_list saved;
        std::vector<IValue> options{call.op.schema().name() + "_gradients"};
        for (size_t k = 0; k < sides; ++k) saved.push_back(outputs[1 + k].toTensor());
        for (const IValue& argument : arguments) {
            if (argument.isTensor() || argument.isNone()) {
                saved.push_back(argument.isTensor() ? argument.toTensor() : Tensor());
            } else {
                options.push_back(argument);
            }
        }
        ctx->save_for_backward(std::move(saved));
        ctx->saved_data["options"] = c10::ivalue::Tuple::create(std::move(options));
        ctx->set_materialize_grads(false);
        return outputs[0].toTensor();
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_values) {
        const Tensor& grad_value = grad_values[0];
        const variable_list saved = ctx->get_saved_variables();
        const at::TensorList arguments = at::TensorList(saved).slice(sides);
        std::vector<size_t> samples;  // which arguments those of `forward` are
        for (size_t i = 0; i < 2 * sides; ++i) {
            if (arguments[i].defined()) samples.push_back(i);
        }
        variable_list gradients(samples.size() + 1);  // the last is that of the call
        if (!grad_value.defined()) return gradients;

        if (at::GradMode::is_enabled()) {
            // A second derivative is wanted. It follows the naive composition.
            const auto& options = ctx->saved_data["options"].toTupleRef().elements();
            c10::List<bool> needed;
            needed.resize(2 * sides, false);
            for (size_t s = 0; s < samples.size(); ++s) needed[samples[s]] = ctx->needs_input_grad(s);
            Stack stack{grad_value, needed};
            for (const Tensor& x : arguments) stack.push_back(x.defined() ? x : IValue());
            stack.insert(stack.end(), options.begin() + 1, options.end());
            const char* name = options[0].toStringRef().c_str();
            c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
            const std::vector<Tensor> found = stack.back().toTensorVector();
            for (size_t s = 0, next = 0; s < samples.size(); ++s) {
                if (needed[samples[s]]) gradients[s] = found[next++];
            }
            return gradients;
        }

        const Tensor scale = grad_value.dim() == 0 ? grad_value : grad_value.unsqueeze(-1);
        Tensor scaled[sides];
        for (size_t s = 0; s < samples.size(); ++s) {
            if (!ctx->needs_input_grad(s)) continue;
            const size_t i = samples[s];
            Tensor& gradient = scaled[i / 2];
            if (!gradient.defined()) gradient = at::mul(scale, saved[i / 2]);
            gradients[s] = (i % 2 == 0 ? gradient : gradient.neg()).to(arguments[i].scalar_type());
        }
        return gradients;
    }
};

template <size_t sides>
void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const Call call{op, keys, *stack};
    variable_list samples;
    bool differentiable = false;
    for (const IValue& argument : call.arguments().slice(0, 2 * sides)) {
        if (!argument.isTensor()) continue;
        samples.push_back(argument.toTensor());
        differentiable |= samples.back().requires_grad();
        TORCH_CHECK_NOT_IMPLEMENTED(!samples.back()._fw_grad(0).defined(), op.schema().name(),
                                    " has no forward-mode derivative; use reverse mode");
    }
    if (!differentiable || !at::GradMode::is_enabled()) return call.run();
    const Tensor value = ScaledGradients<sides>::apply(at::TensorList(samples), call);
    torch::jit::peek(stack, 0, op.schema().returns().size()) = value;
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, Autograd, m) {
    m.impl("preference_loss", torch::CppFunction::makeFromBoxedFunction<autograd<1>>());
    m.impl("sorted_transport", torch::CppFunction::makeFromBoxedFunction<autograd<2>>());
}

}  // namespace robustloss
