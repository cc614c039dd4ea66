// What the glue needs of the CUDA runtime, which it does not include.
#include "mc_device.h"

extern "C" const char* mc_error_string(int64_t error) { return cudaGetErrorString((cudaError_t)error); }
