// Binds the kernels of generation. Tensors come as addresses, as in kernels_bindings.cpp.
#include <pybind11/pybind11.h>

#include "packed_linear.hpp"
#include "paged_attention.hpp"
#include "row_attention.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T = std::uint16_t>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Pieces pieces(long count, Address starts, Address lengths, Address blocks, Address block_offsets,
              Address rows, Address row_offsets) {
  using Numbers = const std::int32_t;
  return {count,
          at<Numbers>(starts),
          at<Numbers>(lengths),
          at<Numbers>(blocks),
          at<Numbers>(block_offsets),
          at<Numbers>(rows),
          at<Numbers>(row_offsets)};
}

}  // namespace

void bind_inference(py::module_& module) {
  py::class_<PagedShape>(module, "PagedShape", "heads, groups, block, width, scale")
      .def(py::init<long, long, long, int, float>());
  py::class_<Pieces>(module, "Pieces", "How many, and the addresses of the arrays; csrc/paged_attention.hpp.")
      .def(py::init(&pieces));
  module.def(
      "rotate_and_store",
      [](const Team& team, const PagedShape& shape, long tokens, Address qkv, Address cos, Address sin,
         long angles, Address positions, Address slots, Address keys, Address values, long blocks,
         Address query) {
        rotate_and_store(team, shape, tokens, at(qkv), {at<float>(cos), at<float>(sin), angles},
                         at<std::int64_t>(positions), at<std::int64_t>(slots), {at(keys), at(values), blocks},
                         at(query));
      },
      py::call_guard<py::gil_scoped_release>(), "New tokens to their places; csrc/paged_attention.hpp.");
  module.def(
      "paged_attention",
      [](const Team& team, const PagedShape& shape, long tokens, Address query, Address positions,
         Address keys, Address values, long blocks, const Pieces& pieces, Address output) {
        paged_attention(team, shape, tokens, at(query), at<std::int64_t>(positions),
                        {at(keys), at(values), blocks}, pieces, at(output));
      },
      py::call_guard<py::gil_scoped_release>(),
      "Attention over pieces of the cache; csrc/paged_attention.hpp.");
  module.def(
      "row_attention",
      [](const Team& team, const PagedShape& shape, long tokens, bool wide, Address query, Address positions,
         Address keys, Address values, long blocks, const Pieces& pieces, Address output) {
        const auto* places = at<std::int64_t>(positions);
        if (wide)
          row_attention<float>(team, shape, tokens, at<float>(query), places,
                               {at<float>(keys), at<float>(values), blocks}, pieces, at<float>(output));
        else
          row_attention<std::uint16_t>(team, shape, tokens, at(query), places,
                                       {at(keys), at(values), blocks}, pieces, at(output));
      },
      py::call_guard<py::gil_scoped_release>(),
      "The same on any processor, for rows that decode; csrc/row_attention.hpp.");
  module.def(
      "int8_linear",
      [](const Team& team, long rows, long out, long in, Address x, Address packed, Address scales,
         Address y) {
        const PackedWeight<std::int8_t> weight{out, in, at<std::int8_t>(packed), at<float>(scales)};
        packed_linear(team, rows, at(x), weight, at(y));
      },
      py::call_guard<py::gil_scoped_release>(), "Product with a weight in int8; csrc/packed_linear.hpp.");
  module.def(
      "bf16_linear",
      [](const Team& team, long rows, long out, long in, Address x, Address packed, Address y) {
        const PackedWeight<std::uint16_t> weight{out, in, at(packed), nullptr};
        packed_linear(team, rows, at(x), weight, at(y));
      },
      py::call_guard<py::gil_scoped_release>(), "Product with a weight in bf16; csrc/packed_linear.hpp.");
}
