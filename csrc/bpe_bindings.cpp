// Python's view of the byte-pair encoding: megatron_codec._csrc.BpeTrainer and BpeEncoder.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bpe_encoder.hpp"
#include "bpe_trainer.hpp"
#include "fault.hpp"

namespace py = pybind11;
using bpe::Document;
using Ids = py::array_t<uint16_t, py::array::c_style>;

namespace {

// The memory of any object with contiguous bytes (bytes, memoryview, numpy uint8), not copied.
class Bytes {
 public:
  explicit Bytes(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE)) throw py::error_already_set();
    if (view_.itemsize != 1) {
      PyBuffer_Release(&view_);
      throw py::type_error("a document is bytes, a memoryview or a contiguous uint8 array");
    }
  }
  ~Bytes() {
    if (view_.obj) PyBuffer_Release(&view_);
  }
  Bytes(Bytes&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  Bytes& operator=(Bytes&&) = delete;

  Document document() const { return {static_cast<const uint8_t*>(view_.buf), static_cast<size_t>(view_.len)}; }

 private:
  Py_buffer view_;
};

std::vector<bpe::Merge> to_merges(const std::vector<std::pair<uint16_t, uint16_t>>& pairs) {
  std::vector<bpe::Merge> merges;
  for (auto [left, right] : pairs) merges.push_back({left, right});
  return merges;
}

std::vector<uint16_t> encode_vector(const bpe::Encoder& encoder, py::handle stream, bool later_part) {
  Bytes bytes(stream);
  py::gil_scoped_release release;
  std::vector<uint16_t> ids(encoder.room(bytes.document().size));
  ids.resize(encoder.encode(bytes.document(), ids.data(), later_part));
  return ids;
}

Ids encode(const bpe::Encoder& encoder, py::handle stream, bool later_part) {
  std::vector<uint16_t> ids = encode_vector(encoder, stream, later_part);
  return Ids(ids.size(), ids.data());
}

py::list encode_to_list(const bpe::Encoder& encoder, py::handle stream) {
  std::vector<uint16_t> ids = encode_vector(encoder, stream, false);
  py::list list(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) PyList_SET_ITEM(list.ptr(), i, PyLong_FromLong(ids[i]));
  return list;
}

py::array_t<int64_t> encode_batch(const bpe::Encoder& encoder, const py::sequence& streams, Ids out,
                                  const std::vector<uint16_t>& around, int threads) {
  std::vector<Bytes> held;
  std::vector<Document> documents;
  size_t needed = 0;
  for (py::handle stream : streams) {
    documents.push_back(held.emplace_back(stream).document());
    needed += encoder.room(documents.back().size) + around.size();
  }
  if (static_cast<size_t>(out.size()) < needed)
    throw UserFault("a buffer of " + std::to_string(out.size()) + " ids", "has to hold " + std::to_string(needed),
                    "make room for each byte of the documents, and for the ids around them");
  uint16_t* target = out.mutable_data();
  std::vector<int64_t> offsets;
  {
    py::gil_scoped_release release;
    offsets = encoder.encode(documents, around, threads, target);
  }
  return py::array_t<int64_t>(offsets.size(), offsets.data());
}

py::bytes decode(const bpe::Encoder& encoder, const Ids& ids) {
  py::bytes stream(nullptr, encoder.decoded_size(ids.data(), ids.size()));
  encoder.decode(ids.data(), ids.size(), PyBytes_AS_STRING(stream.ptr()));
  return stream;
}

// The least that any program must do with each byte: what encoding is measured beside.
py::array_t<int64_t> byte_histogram(py::handle stream) {
  Bytes bytes(stream);
  auto [data, size] = bytes.document();
  int64_t counts[4][256] = {};  // four, so that equal bytes in a row do not wait for each other
  size_t i = 0;
  for (; i + 4 <= size; i += 4)
    for (size_t k = 0; k < 4; ++k) ++counts[k][data[i + k]];
  for (; i < size; ++i) ++counts[0][data[i]];
  for (size_t byte = 0; byte < 256; ++byte) counts[0][byte] += counts[1][byte] + counts[2][byte] + counts[3][byte];
  return py::array_t<int64_t>(256, counts[0]);
}

}  // namespace

void bind_bpe(py::module_& module) {
  module.def("byte_histogram", byte_histogram);

  py::class_<bpe::Trainer>(module, "BpeTrainer")
      .def(py::init<size_t>(), py::arg("max_token_length"))
      .def("add", [](bpe::Trainer& trainer, py::handle stream) {
        Bytes bytes(stream);
        trainer.add(bytes.document().data, bytes.document().size);
      })
      .def("merge", [](bpe::Trainer& trainer) -> std::optional<std::tuple<int, int, size_t>> {
        py::gil_scoped_release release;
        auto choice = trainer.merge();
        if (!choice) return std::nullopt;
        return std::make_tuple(choice->merge.left, choice->merge.right, choice->places);
      });

  py::class_<bpe::Encoder>(module, "BpeEncoder")
      .def(py::init([](const std::vector<std::pair<uint16_t, uint16_t>>& merges, const std::vector<uint16_t>& ids,
                       const std::vector<uint16_t>& prefix) {
             return std::make_unique<bpe::Encoder>(bpe::Vocabulary(to_merges(merges)), ids, prefix);
           }),
           py::arg("merges"), py::arg("ids"), py::arg("prefix"))
      .def("encode", encode, py::arg("stream"), py::arg("later_part") = false)
      .def("encode_to_list", encode_to_list)
      .def("encode_batch", encode_batch)
      .def("last_border", [](const bpe::Encoder& encoder, py::handle stream, size_t from) {
        return encoder.last_border(Bytes(stream).document(), from);
      })
      .def("decode", decode)
      .def_property_readonly("proper", [](const bpe::Encoder& encoder) { return encoder.vocabulary().proper(); });
}
