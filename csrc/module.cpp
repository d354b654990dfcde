// The Python module `robustloss._C`. It is empty: importing it loads this library, and the static
// registrations (TORCH_LIBRARY_IMPL) of the other files do the rest.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr};
    return PyModule_Create(&definition);
}
