#include "cuda_on_cpu.h"

#include KERNEL_FILE

// As cuLaunchKernel: pointers in their order, then numbers.
template <class Argument> static Argument next(void**& pointers, const int*& numbers) {
  if constexpr (std::is_pointer_v<Argument>)
    return (Argument)*pointers++;
  else
    return *numbers++;
}

template <class... Arguments>
static void run(void (*kernel)(Arguments...), void** pointers, const int* numbers) {
  const std::tuple<Arguments...> arguments{next<Arguments>(pointers, numbers)...};
  std::apply(kernel, arguments);
}

extern "C" void launch(int columns, int rows, void** pointers, const int* numbers) {
  gridDim = {columns, rows, 1};
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < columns; x++) {
      std::barrier<> block(THREADS);
      block_barrier = &block;
      for (auto& warp : warp_barriers) warp = new std::barrier<>(32);
      std::vector<std::thread> threads;
      for (int thread = 0; thread < THREADS; thread++)
        threads.emplace_back([=] {
          threadIdx = {thread, 0, 0};
          blockIdx = {x, y, 0};
          run(KERNEL_NAME, pointers, numbers);
        });
      for (auto& thread : threads) thread.join();
      for (auto& warp : warp_barriers) delete warp;
    }
}
