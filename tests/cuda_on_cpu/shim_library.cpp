// What a test calls in a library of kernels compiled for the CPU: every call of a launcher goes through mc_shim_call, which turns the
// shim's exceptions into text.
#include <cxxabi.h>
#include <dlfcn.h>

#include "cuda_shim.h"

namespace {
std::string g_error;
}

#define MC_EXPORT extern "C" __attribute__((visibility("default")))

MC_EXPORT int64_t mc_shim_call(int64_t (*launcher)(const void*, void*), const void* args) {
  g_error.clear();
  try {
    return launcher(args, nullptr);
  } catch (const std::exception& e) {
    g_error = e.what();
  }
  return -1;
}
MC_EXPORT const char* mc_shim_error() { return g_error.c_str(); }
MC_EXPORT void mc_shim_shared_limit(int64_t bytes) { mcshim::g_shared_limit = bytes; }
MC_EXPORT void mc_shim_processors(int64_t n) { mcshim::g_processors = n; }
MC_EXPORT void mc_shim_record(mcshim::Recorder recorder) { mcshim::g_recorder = recorder; }
// A kernel's symbol, which is the one nvcc gives it.
MC_EXPORT const char* mc_shim_name(const void* kernel) {
  Dl_info info{};
  return dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "";
}
