// memcore._store: the slot table of memcore.DND. A module of its own, because pybind11 knows no stable ABI.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dlpack.h"
#include "slot_table.h"

namespace py = pybind11;
using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

namespace memcore {
namespace {

template <class T> bool finite(const T* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Bits exponent = sizeof(T) == 4 ? (Bits)0x7f800000u : (Bits)0x7ff0000000000000u;  // all ones in NaN and Inf
  Bits bad = 0;
  for (int64_t i = 0; i < n; i++) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bad |= (bits & exponent) == exponent;
  }
  return !bad;
}

// torch.Tensor and its way to C; null before use_tensors, and where torch has none.
const dlpack::Exchange* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;

void use_tensors(py::type type, py::capsule capsule) {
  const auto* api = capsule.get_pointer<const dlpack::Exchange>();
  while (api && api->major != 1) api = api->older;
  exchange = api, tensor_type = (PyTypeObject*)type.inc_ref().ptr();
}

// A contiguous tensor of the CPU, `width` columns (0: it is a vector); sets `n` to its rows, or, if it is set, wants so many. Null for all else.
const void* rows_of(py::handle tensor, uint8_t code, int64_t bytes, int64_t width, int64_t& n) {
  if (!exchange || Py_TYPE(tensor.ptr()) != tensor_type) return nullptr;
  dlpack::Tensor t;
  if (exchange->tensor_of(tensor.ptr(), &t) != 0) {
    PyErr_Clear();
    return nullptr;
  }
  const int dims = width ? 2 : 1;
  if (t.device.type != dlpack::kCpu || t.dtype.code != code || t.dtype.bits != 8 * bytes || t.dtype.lanes != 1 || t.dims != dims) return nullptr;
  if (n >= 0 && t.shape[0] != n) return nullptr;
  if (width && t.shape[1] != width) return nullptr;
  if (t.strides && ((width > 1 && t.strides[1] != 1) || (t.shape[0] > 1 && t.strides[0] != (width ? width : 1)))) return nullptr;
  n = t.shape[0];
  return n ? (const char*)t.data + t.offset : nullptr;
}

class Table {
 public:
  Table(int64_t A, int64_t N) : slots(A, N) {}

  int64_t find(int64_t a, int64_t hash) const { return slots.find(a, (uint64_t)hash); }
  int64_t size(int64_t a) const { return slots.size(a); }
  void clear(int64_t a) { slots.clear(a); }

  py::tuple put(const Ints& dictionaries, const Ints& hashes) {
    const int64_t n = hashes.size();
    py::array_t<int64_t> to(n);
    py::array_t<uint8_t> kinds(n);
    for (int64_t i = 0; i < n; i++) {
      SlotTable::Kind kind;
      to.mutable_at(i) = slots.put(checked(dictionaries.at(i)), (uint64_t)hashes.at(i), kind);
      kinds.mutable_at(i) = (uint8_t)kind;
    }
    return py::make_tuple(to, kinds);
  }

  py::tuple remove(int64_t a, int64_t hash) {
    int64_t moved = -1;
    const int64_t slot = slots.remove(checked(a), (uint64_t)hash, moved);
    return py::make_tuple(slot, moved);
  }

  py::array_t<int64_t> order(int64_t a) const {
    py::array_t<int64_t> to(slots.size(a));
    slots.order(a, to.mutable_data());
    return to;
  }

  py::array_t<int64_t> hashes(int64_t a) const {
    py::array_t<int64_t> to(slots.size(a));
    for (int64_t s = 0; s < to.size(); s++) to.mutable_at(s) = (int64_t)slots.hash_of(a, s);
    return to;
  }

  void oldest(int64_t a, const Ints& which) { slots.oldest(a, which.data(), which.size()); }

  void touch(int64_t a, const Ints& which) {
    for (int64_t i = 0; i < which.size(); i++)
      if (which.at(i) >= 0 && which.at(i) < slots.size(checked(a))) slots.touch(a, which.at(i));
  }

  // indices [A,Q,K] of int64 at an address: queries in their order, of one query the nearest last; -1 is skipped.
  void touch_at(int64_t first, uintptr_t address, int64_t A, int64_t Q, int64_t K) {
    const int64_t* at = (const int64_t*)address;
    for (int64_t a = 0; a < A; a++)
      for (int64_t q = 0; q < Q; q++, at += K) {
        const auto each = [&](auto f) {
          for (int64_t k = K - 1; k >= 0; k--)
            if (at[k] >= 0 && at[k] < slots.size(first + a)) f(at[k]);
        };
        each([&](int64_t slot) { slots.fetch_slot(first + a, slot); });
        each([&](int64_t slot) { slots.fetch_links(first + a, slot); });
        each([&](int64_t slot) { slots.touch(first + a, slot); });
      }
  }

  // Keys, values, epoch and counts, cached norms, bfloat16 copies and greatest errors of them, optimizer's steps. The last three may be 0.
  void bind(int64_t D, int64_t V, int64_t element, uintptr_t keys, uintptr_t values, uintptr_t head, uintptr_t norms, uintptr_t mirror,
            uintptr_t rounding, uintptr_t steps) {
    rings = {D, V, element, (char*)keys, (char*)values, (int64_t*)head, (char*)norms, (uint16_t*)mirror, (float*)rounding, (int64_t*)steps};
  }

  // n entries at addresses, one after another; `hashes`, `dictionaries` and `to` may be 0. `to` [n,2] gets
  // slot and kind.
  void write(uintptr_t keys, uintptr_t values, uintptr_t hashes, uintptr_t dictionaries, int64_t dictionary, int64_t n, double alpha, uintptr_t to) {
    if (!rings.head) throw std::logic_error("memcore._store: write before bind");
    const auto all = [&](auto* keys_at, auto* values_at) {
      using T = std::remove_pointer_t<decltype(keys_at)>;
      write_all(keys_at, values_at, (const T*)keys, (const T*)values, (const int64_t*)hashes, (const int64_t*)dictionaries, dictionary, n,
                alpha, (int64_t*)to);
    };
    if (rings.element == 4) all((float*)rings.keys, (float*)rings.values);
    else all((double*)rings.keys, (double*)rings.values);
  }

  // The same of tensors, `hashes` may be None and so may the only dictionary, if they are as plain as can be; else false, and nothing is written.
  bool write_tensors(py::handle keys, py::handle values, py::handle hashes, py::handle which, double alpha) {
    int64_t dictionary = 0, n = -1;
    if (PyLong_CheckExact(which.ptr())) {
      int overflow;
      dictionary = PyLong_AsLongLongAndOverflow(which.ptr(), &overflow);
      if (overflow || dictionary < 0 || dictionary >= slots.A) return false;
    } else if (!which.is_none() || slots.A != 1) {
      return false;
    }
    const void* k = rows_of(keys, dlpack::kFloat, rings.element, rings.D, n);
    const void* v = k ? rows_of(values, dlpack::kFloat, rings.element, rings.V, n) : nullptr;
    const void* h = v && !hashes.is_none() ? rows_of(hashes, dlpack::kInt, 8, 0, n) : nullptr;
    if (!v || (!h && !hashes.is_none())) return false;
    write((uintptr_t)k, (uintptr_t)v, (uintptr_t)h, 0, dictionary, n, alpha, 0);
    return true;
  }

  // How many writes updated, appended, replaced, and were rejected.
  py::tuple written() const { return py::make_tuple(counts[0], counts[1], counts[2], counts[3]); }

 private:
  int64_t checked(int64_t a) const {
    if (a < 0 || a >= slots.A) throw std::out_of_range("memcore._store: dictionary " + std::to_string(a) + " of " + std::to_string(slots.A));
    return a;
  }

  void publish(int64_t by) { ((std::atomic<int64_t>*)rings.head)->fetch_add(by, std::memory_order_acq_rel); }

  template <class T>
  void write_all(T* ring_keys, T* ring_values, const T* keys, const T* values, const int64_t* hashes, const int64_t* dictionaries, int64_t a,
                 int64_t n, double alpha, int64_t* to) {
    const int64_t D = rings.D, V = rings.V, N = slots.N;
    for (int64_t i = 0; i < (dictionaries ? n : 1); i++) checked(dictionaries ? dictionaries[i] : a);
    publish(1);
    if (n == 1) fetch_oldest(ring_keys, ring_values, dictionaries ? dictionaries[0] : a);
    uint64_t ahead[kAhead];
    for (int64_t i = 0; i < n; i++, keys += D, values += V) {
      if (i % kAhead == 0) {
        const int64_t m = n - i < kAhead ? n - i : kAhead;
        for (int64_t j = 0; j < m; j++) ahead[j] = hashes ? (uint64_t)hashes[i + j] : hash_bytes(keys + j * D, D * (int64_t)sizeof(T));
        if (m > 1) fetch(ring_keys, ring_values, ahead, m, dictionaries ? dictionaries + i : nullptr, a);
        else slots.fetch_replaced(dictionaries ? dictionaries[i] : a, ahead[0]);
      }
      if (dictionaries) a = dictionaries[i];
      if (!finite(keys, D) || !finite(values, V)) {
        counts[REJECTED]++;
        if (to) to[2 * i] = -1, to[2 * i + 1] = REJECTED;
        continue;
      }
      SlotTable::Kind kind;
      const int64_t slot = slots.put(a, ahead[i % kAhead], kind);
      const int64_t row = a * N + slot;
      counts[kind]++;
      if (to) to[2 * i] = slot, to[2 * i + 1] = kind;
      set_key(ring_keys + row * D, keys, a, row);
      T* v = ring_values + row * V;
      if (kind == SlotTable::UPDATED) {
        for (int64_t j = 0; j < V; j++) v[j] = (T)((1 - alpha) * v[j] + alpha * values[j]);  // this form cannot overflow
        continue;
      }
      std::memmove(v, values, (size_t)V * sizeof(T));
      if (rings.steps) rings.steps[row] = 0;
      if (kind == SlotTable::APPENDED) rings.head[1 + a] = slots.size(a);
    }
    publish(1);
    if (n > 0) fetch_oldest(ring_keys, ring_values, a);  // whom the next write is likely to replace
  }

  template <class T> void fetch_row(const T* ring_keys, const T* ring_values, int64_t row) const {
    const int64_t D = rings.D;
    for (int64_t d = 0; d < D; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(ring_keys + row * D + d, 1);
    __builtin_prefetch(ring_values + row * rings.V, 1);
    __builtin_prefetch((const T*)rings.norms + row, 1);
    if (rings.mirror)
      for (int64_t d = 0; d < D; d += 32) __builtin_prefetch(rings.mirror + row * D + d, 1);
  }
  // Asks for the memory of the entry used least recently, if a new one would take its place.
  template <class T> void fetch_oldest(const T* ring_keys, const T* ring_values, int64_t a) const {
    const int64_t slot = slots.replaced(a);
    if (slot < 0) return;
    slots.fetch_slot(a, slot);
    fetch_row(ring_keys, ring_values, a * slots.N + slot);
  }

  // Asks for the memory that some entries will need, all of them at once.
  template <class T> void fetch(const T* ring_keys, const T* ring_values, const uint64_t* hashes, int64_t n, const int64_t* dictionaries, int64_t a) const {
    const auto owner = [&](int64_t i) { return dictionaries ? dictionaries[i] : a; };
    int64_t found[kAhead];
    for (int64_t i = 0; i < n; i++) slots.fetch_bucket(owner(i), hashes[i]);
    for (int64_t i = 0; i < n; i++) found[i] = slots.fetch_node(owner(i), hashes[i]);
    for (int64_t i = 0; i < n; i++) {
      if (found[i] < 0) continue;
      slots.fetch_links(owner(i), found[i]);
      fetch_row(ring_keys, ring_values, owner(i) * slots.N + found[i]);
    }
  }

  template <class T> void set_key(T* to, const T* key, int64_t a, int64_t row) {
    const int64_t D = rings.D;
    std::memmove(to, key, (size_t)D * sizeof(T));
    double sums[4] = {0, 0, 0, 0};
    for (int64_t d = 0; d < D; d++) sums[d & 3] += (double)key[d] * key[d];
    const double norm = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    ((T*)rings.norms)[row] = (T)norm;
    if constexpr (sizeof(T) == 4) {
      if (!rings.mirror) return;
      double lost = 0;
      for (int64_t d = 0; d < D; d++) {
        uint32_t bits;
        std::memcpy(&bits, key + d, 4);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;  // to nearest, ties to even
        rings.mirror[row * D + d] = (uint16_t)(rounded >> 16);
        float copy;
        std::memcpy(&copy, &rounded, 4);
        lost += ((double)copy - key[d]) * ((double)copy - key[d]);
      }
      const double ratio = std::sqrt(lost / norm) * 1.001;  // as knn_cache has it: rounded up; no number, no claim
      if (std::isfinite(ratio) && ratio > rings.rounding[a]) rings.rounding[a] = (float)ratio;
    }
  }

  static constexpr int REJECTED = 3;
  static constexpr int64_t kAhead = 16;  // entries whose memory is asked for together
  SlotTable slots;
  Rings rings;
  int64_t counts[4] = {0, 0, 0, 0};
};

// write_tensors without pybind11's dispatcher, which a search sweeps from the caches.
constexpr const char* kTable = "memcore.SlotTable";
PyObject* write_plain(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  auto* table = (Table*)PyCapsule_GetPointer(self, kTable);
  if (!table) return nullptr;
  if (n != 5) return PyErr_Format(PyExc_TypeError, "memcore._store: 5 arguments, not %zd", n);
  const double alpha = PyFloat_AsDouble(args[4]);
  if (alpha == -1 && PyErr_Occurred()) return nullptr;
  try {
    return PyBool_FromLong(table->write_tensors(args[0], args[1], args[2], args[3], alpha));
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}
PyMethodDef write_plain_def = {"write_tensors", (PyCFunction)(void (*)(void))write_plain, METH_FASTCALL, nullptr};

// A function (keys, values, hashes, dictionary, alpha) that keeps its table alive.
py::object writer(py::object table) {
  PyObject* owner = table.inc_ref().ptr();
  py::capsule capsule(table.cast<Table*>(), kTable, [](PyObject* c) { Py_XDECREF((PyObject*)PyCapsule_GetContext(c)); });
  PyCapsule_SetContext(capsule.ptr(), owner);
  PyObject* made = PyCFunction_New(&write_plain_def, capsule.ptr());
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

}  // namespace
}  // namespace memcore

PYBIND11_MODULE(_store, m) {
  using memcore::Table;
  m.def("hash_rows", [](uintptr_t data, int64_t rows, int64_t size) {
    py::array_t<int64_t> to(rows);
    for (int64_t i = 0; i < rows; i++) to.mutable_at(i) = (int64_t)memcore::hash_bytes((const char*)data + i * size, size);
    return to;
  });
  m.def("use_tensors", &memcore::use_tensors);
  py::class_<Table>(m, "SlotTable")
      .def(py::init<int64_t, int64_t>())
      .def("find", &Table::find)
      .def("size", &Table::size)
      .def("clear", &Table::clear)
      .def("put", &Table::put)
      .def("remove", &Table::remove)
      .def("order", &Table::order)
      .def("hashes", &Table::hashes)
      .def("oldest", &Table::oldest)
      .def("touch", &Table::touch)
      .def("touch_at", &Table::touch_at)
      .def("bind", &Table::bind)
      .def("write", &Table::write)
      .def("writer", &memcore::writer)
      .def("written", &Table::written);
}
