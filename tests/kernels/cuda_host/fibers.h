// The threads of one block as fibers of one thread: each runs until it waits for others, in an order that the caller
// chooses, so that a run is repeatable and its opposite order can be tried too.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace dsd_fast::cuda::host {

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "cuda_host: %s\n", reason);
  std::exit(3);
}

struct Index {
  unsigned x;
};

// Fibers that meet: each leaves a pointer to what it brings, the last to come does the work for all of them.
struct Meeting {
  std::vector<void*> brought;
  const void* kind = nullptr;  // which call they are in; a meeting of different calls is an error
  int arrived = 0;
  uint64_t held = 0;
};

struct Fiber {
  ucontext_t context;
  const Meeting* waits_for = nullptr;
  uint64_t held_before = 0;
  bool done = false;
  std::vector<std::function<void()>> copies;  // asynchronous ones that were started and not waited for
};

class Block {
 public:
  static constexpr size_t kStack = 128 * 1024;

  Block(int threads, size_t shared_bytes, bool reversed)
      : shared(new unsigned char[shared_bytes]), shared_bytes(shared_bytes), reversed(reversed), fibers(threads),
        warps(threads / 32) {
    for (size_t i = 0; i < shared_bytes; ++i) shared[i] = 0xff;
    for (Meeting& warp : warps) warp.brought.resize(32);
    all.brought.resize(threads);
    // Blocks run one after the other, on the same stacks.
    while (stacks.size() < fibers.size()) stacks.emplace_back(new char[kStack]);
  }

  void run(const std::function<void()>& kernel) {
    body = kernel;
    now = this;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[i].get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    // A warp runs as far as it can before the next one starts: what it should have waited for has not happened then.
    for (bool progress = true; progress;) {
      progress = false;
      for (size_t i = 0; i < warps.size(); ++i) {
        while (run_warp(reversed ? warps.size() - 1 - i : i)) progress = true;
      }
    }
    for (const Fiber& fiber : fibers) {
      if (!fiber.done) fail("threads wait for others that never come");
      if (!fiber.copies.empty()) fail("a thread ended with copies it did not wait for");
    }
  }

  // Meets the other threads of the warp or block in the call `kind`; `work` gets what each brought, in order of threads.
  template <class Work>
  void meet(bool whole_block, const void* kind, void* mine, const Work& work) {
    Meeting& meeting = whole_block ? all : warps[thread / 32];
    const unsigned place = whole_block ? thread : thread % 32;
    if (meeting.arrived > 0 && meeting.kind != kind) fail("the threads of a warp are in different calls");
    meeting.kind = kind;
    meeting.brought[place] = mine;
    if (++meeting.arrived == static_cast<int>(meeting.brought.size())) {
      work(meeting.brought);
      meeting.arrived = 0;
      ++meeting.held;
      return;
    }
    Fiber& fiber = fibers[thread];
    fiber.waits_for = &meeting;
    fiber.held_before = meeting.held;
    const unsigned self = thread;
    swapcontext(&fiber.context, &scheduler);
    thread = self;
  }

  Fiber& fiber() { return fibers[thread]; }

  // `bytes` of shared memory at an address that has to be a multiple of `alignment`.
  unsigned char* at(unsigned address, size_t bytes, size_t alignment) {
    if (address + bytes > shared_bytes) fail("an address beyond shared memory");
    if (address % alignment != 0) fail("a misaligned address in shared memory");
    return shared.get() + address;
  }

  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes;
  unsigned thread = 0;
  static inline Block* now = nullptr;
  static inline Index block_index{0};

 private:
  // Lets every thread of the warp that can run do so once; whether there was one.
  bool run_warp(size_t warp) {
    bool progress = false;
    for (size_t i = 0; i < 32; ++i) {
      thread = static_cast<unsigned>(32 * warp + (reversed ? 31 - i : i));
      Fiber& fiber = fibers[thread];
      if (fiber.done || (fiber.waits_for != nullptr && fiber.waits_for->held == fiber.held_before)) continue;
      fiber.waits_for = nullptr;
      swapcontext(&scheduler, &fiber.context);
      progress = true;
    }
    return progress;
  }

  static void enter() {
    Block* block = now;
    block->body();
    block->fiber().done = true;
  }

  bool reversed;
  static inline std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  ucontext_t scheduler;
  std::function<void()> body;
};

}  // namespace dsd_fast::cuda::host
