// The Python module `robustloss._C`. Importing it loads this library, and the static registrations
// (TORCH_LIBRARY_IMPL) of the other files do the rest. Its two strings are what `robustloss doctor` tells:
// the torch that this was built against, and which of the instruction sets the kernels take on this
// processor.
#include <Python.h>
#include <torch/version.h>

#include "instruction_set.h"

PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr};
    PyObject* module = PyModule_Create(&definition);
    if (module == nullptr || PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) < 0 ||
        PyModule_AddStringConstant(module, "instruction_set", robustloss::instruction_set().c_str()) < 0) {
        Py_XDECREF(module);
        return nullptr;
    }
    return module;
}
