// The module `memcore._C`: empty. Loading it registers the operators, by the static initialisers of the other files.
//
// What it needs of Python's stable ABI is declared here rather than included, so that the library also builds where
// the interpreter is installed without its headers. The layouts are those of CPython's Include/moduleobject.h and are
// frozen for every version with the limited API (abi3).

#include <cstddef>

extern "C" {

struct PyObject {
  std::ptrdiff_t ob_refcnt;
  void* ob_type;
};

struct PyModuleDef {
  PyObject ob_base;
  PyObject* (*m_init)();
  std::ptrdiff_t m_index;
  PyObject* m_copy;
  const char* m_name;
  const char* m_doc;
  std::ptrdiff_t m_size;
  void* m_methods;
  void* m_slots;
  void* m_traverse;
  void* m_clear;
  void* m_free;
};

constexpr int kLimitedApi = 3;  // PYTHON_ABI_VERSION

PyObject* PyModule_Create2(PyModuleDef* definition, int api_version);

__attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {{1, nullptr}, nullptr, 0, nullptr, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create2(&definition, kLimitedApi);
}

}  // extern "C"
