// Binds the kernels of training. Tensors come as addresses and strides, so nothing of torch is needed to build.
#include <pybind11/pybind11.h>

#include <tuple>

#include "amx.hpp"
#include "attention.hpp"
#include "elementwise.hpp"

#if defined(HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

bool has_amx() {
#if defined(HAVE_AMX)
  static const bool present = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return false;  // AVX512_BF16
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return false;
    // Linux gives the state of the tiles to processes that ask: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return present;
#else
  return false;
#endif
}

namespace {

using Address = std::uintptr_t;
using Place = std::tuple<Address, long, long, long>;

Heads heads(const Place& place) {
  const auto& [data, s, b, n] = place;
  return {reinterpret_cast<std::uint16_t*>(data), s, b, n};
}

template <typename T = std::uint16_t>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_kernels(py::module_& module) {
  module.def("has_amx", &has_amx, "Whether the kernels can run: AMX, AVX-512 with bf16, and the system's leave.");
  py::class_<Team>(module, "Team", "The threads of a kernel: the address of GOMP_parallel or 0, and how many.")
      .def(py::init<Address, int>());
  py::class_<AttentionShape>(module, "AttentionShape", "sequence, batch, heads, groups, width, scale")
      .def(py::init<long, long, long, long, int, float>());
  module.def(
      "attention_forward",
      [](const Team& team, const AttentionShape& shape, Address cos, Address sin, const Place& query,
         const Place& key, const Place& value, const Place& output, Address lse) {
        attention_forward(team, shape, {at<float>(cos), at<float>(sin)}, heads(query), heads(key), heads(value),
                          heads(output), at<float>(lse));
      },
      py::call_guard<py::gil_scoped_release>(), "Causal attention; csrc/attention.hpp.");
  module.def(
      "attention_backward",
      [](const Team& team, const AttentionShape& shape, Address cos, Address sin, const Place& query,
         const Place& key, const Place& value, const Place& output, Address lse, const Place& to_output,
         const Place& to_query, const Place& to_key, const Place& to_value) {
        attention_backward(team, shape, {at<float>(cos), at<float>(sin)}, heads(query), heads(key), heads(value),
                           heads(output), at<float>(lse), heads(to_output), heads(to_query), heads(to_key),
                           heads(to_value));
      },
      py::call_guard<py::gil_scoped_release>(), "Its gradients; csrc/attention.hpp.");
  module.def(
      "rms_norm_forward",
      [](const Team& team, long rows, long width, float epsilon, Address x, Address weight, Address y,
         Address scale) { rms_norm_forward(team, rows, width, epsilon, at(x), at(weight), at(y), at<float>(scale)); },
      py::call_guard<py::gil_scoped_release>(), "RMSNorm; csrc/elementwise.hpp.");
  module.def(
      "rms_norm_backward",
      [](const Team& team, long rows, long width, Address x, Address weight, Address scale, Address to_y,
         Address to_x, Address to_weight) {
        rms_norm_backward(team, rows, width, at(x), at(weight), at<float>(scale), at(to_y), at(to_x),
                          at(to_weight));
      },
      py::call_guard<py::gil_scoped_release>(), "Its gradients; csrc/elementwise.hpp.");
  module.def(
      "swiglu_forward",
      [](const Team& team, long rows, long width, Address gate_and_up, Address y) {
        swiglu_forward(team, rows, width, at(gate_and_up), at(y));
      },
      py::call_guard<py::gil_scoped_release>(), "SwiGLU; csrc/elementwise.hpp.");
  module.def(
      "swiglu_backward",
      [](const Team& team, long rows, long width, Address gate_and_up, Address to_y, Address to_gate_and_up) {
        swiglu_backward(team, rows, width, at(gate_and_up), at(to_y), at(to_gate_and_up));
      },
      py::call_guard<py::gil_scoped_release>(), "Its gradient; csrc/elementwise.hpp.");
}
