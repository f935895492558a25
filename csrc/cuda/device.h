// What launchers need of a device: is it a Hopper, may a kernel have its shared memory, tensor
// maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace quant {

// Makes `device` the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  int status() const { return status_; }

 private:
  int before_ = -1, status_;
};

// A status where the device is no Hopper (capability 9.0).
int require_hopper(int device);

// Lets a kernel have so much dynamic shared memory on the current device, once.
int allow_shared_memory(const void* kernel, int device, int bytes);

// A map of bytes [height, width] in rows of `stride`, boxes swizzled in 128 bytes; the driver is
// asked.
int make_tensor_map(CUtensorMap* map, const void* base, int64_t width, int64_t height,
                    int64_t stride, int box_width, int box_height);

// Zeros on the device that belong to a workspace: blocks that wait for each other count there, and
// leave zeros. Null with a status in *status.
uint32_t* flags_of(const void* workspace, int device, int* status);

// In clusters of `cluster` blocks, before the kernel ahead of it in the stream has ended.
int launch(const void* kernel, int blocks, int threads, int cluster, int shared_bytes,
           void** arguments, cudaStream_t stream);

}  // namespace quant
