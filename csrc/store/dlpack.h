// What is needed of DLPack 1 (https://dmlc.github.io/dlpack): how C reads a tensor of Python without a call into its methods.
#pragma once

#include <cstdint>

namespace memcore {
namespace dlpack {

enum : int32_t { kCpu = 1 };
enum : uint8_t { kInt = 0, kFloat = 2 };

struct Tensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t dims;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t offset;  // in bytes
};

// The capsule `__dlpack_c_exchange_api__` of a tensor type.
struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void *allocate, *from_object, *to_object;
  int (*tensor_of)(void* object, Tensor* to);  // 0, or a Python error; borrows all of it from the object
  void* current_stream;
};

}  // namespace dlpack
}  // namespace memcore
