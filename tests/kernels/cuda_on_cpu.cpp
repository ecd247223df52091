#include "cuda_on_cpu.h"

#include "route.cu"

// As cuLaunchKernel, for pointers in the order of route_and_count.
extern "C" void launch(int groups, int stripes, void** p, int num_tokens, int num_experts, int rows) {
  gridDim = {groups, stripes, 1};
  for (int y = 0; y < stripes; y++)
    for (int x = 0; x < groups; x++) {
      std::barrier<> block(THREADS);
      block_barrier = &block;
      for (auto& warp : warp_barriers) warp = new std::barrier<>(32);
      std::vector<std::thread> threads;
      for (int thread = 0; thread < THREADS; thread++)
        threads.emplace_back([=] {
          threadIdx = {thread, 0, 0};
          blockIdx = {x, y, 0};
          route_and_count(
              (const float*)p[0], (const float*)p[1], (const float*)p[2], (const float*)p[3],
              (const unsigned char*)p[4], (const float*)p[5], (float*)p[6], (uchar4*)p[7], (u32*)p[8],
              (u32*)p[9], (u64*)p[10], (u64*)p[11], num_tokens, num_experts, rows);
        });
      for (auto& thread : threads) thread.join();
      for (auto& warp : warp_barriers) delete warp;
    }
}
