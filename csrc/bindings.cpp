// The extension module megatron_codec._csrc. Each part of csrc/ binds itself in its own file.
#include <pybind11/pybind11.h>

#include "fault.hpp"

namespace py = pybind11;

void bind_bpe(py::module_& module);
void bind_inference(py::module_& module);
void bind_jpeg(py::module_& module);
void bind_kernels(py::module_& module);

static void raise_user_error(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const UserFault& fault) {
    py::object type = py::module_::import("megatron_codec.errors").attr("UserError");
    py::object error = type(fault.value, fault.rule, fault.remedy);
    PyErr_SetObject(type.ptr(), error.ptr());
  }
}

PYBIND11_MODULE(_csrc, module) {
  module.doc() = "C++ behind megatron_codec: byte-pair encoding, the grammar of JPEG scans, kernels of training and generation.";
  py::register_exception_translator(raise_user_error);
  bind_bpe(module);
  bind_kernels(module);
  bind_inference(module);
  bind_jpeg(module);
}
