// Chooses the instruction set once, at the first call.
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace rlhf_fast {
namespace {

#define RF_CPU_OPS(ISA)                                                                               \
  CpuOps {                                                                                            \
    #ISA, &ISA::token_logprobs_forward, &ISA::token_logprobs_backward, &ISA::head_rows, &ISA::gae,    \
        &ISA::kl_shaped_gae, &ISA::policy_loss, &ISA::value_loss, &ISA::scale, &ISA::decode_attention \
  }

const CpuOps tables[] = {
#ifdef RF_X86
    RF_CPU_OPS(avx512),
    RF_CPU_OPS(avx2),
#endif
    RF_CPU_OPS(base),
};

bool runs_here(const std::string& isa) {
#ifdef RF_X86
  __builtin_cpu_init();
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return isa == "base";
}

std::string names_that_run() {
  std::string names;
  for (const char* const* name = supported_isas(); *name; ++name) {
    names += (names.empty() ? "" : ", ") + std::string(*name);
  }
  return names;
}

const CpuOps* find(const std::string& name) {
  for (const CpuOps& table : tables) {
    if (name == table.name && runs_here(name)) {
      return &table;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not supported by this processor; choose " +
                              names_that_run());
}

const CpuOps* first_choice() {
  const char* named = std::getenv("RLHF_FAST_CPU_ISA");
  return find(named && *named ? named : *supported_isas());
}

std::atomic<const CpuOps*> chosen{nullptr};

}  // namespace

const char* const* supported_isas() {
  struct List {
    const char* names[std::size(tables) + 1] = {};
    List() {
      int count = 0;
      for (const CpuOps& table : tables) {
        if (runs_here(table.name)) {
          names[count++] = table.name;
        }
      }
    }
  };
  static const List list;
  return list.names;
}

const CpuOps& cpu_ops() {
  const CpuOps* ops = chosen.load(std::memory_order_acquire);
  if (!ops) {
    ops = first_choice();
    chosen.store(ops, std::memory_order_release);
  }
  return *ops;
}

void select_isa(const char* name) {
  chosen.store(find(name), std::memory_order_release);
}

}  // namespace rlhf_fast
