// Binds the automaton of JPEG scans, and what it allows token by token.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>

#include "fault.hpp"
#include "jpeg_grammar.hpp"

namespace py = pybind11;

namespace {

using jpeg::Cursor;
using jpeg::Fault;
using jpeg::Grammar;
using jpeg::Position;
using jpeg::Scan;
using Table = std::pair<std::array<int, 16>, py::bytes>;  // codes of each length; symbols
using Range = std::pair<std::array<int, 64>, std::array<int, 64>>;

std::vector<jpeg::HuffmanTable> tables(const std::vector<Table>& from) {
  std::vector<jpeg::HuffmanTable> to;
  for (const auto& [counts, symbols] : from) {
    const std::string_view bytes = symbols;
    to.push_back({counts, {bytes.begin(), bytes.end()}});
  }
  return to;
}

Scan make_scan(std::vector<int> blocks, const std::vector<Table>& dc, const std::vector<Table>& ac, long mcus,
               long interval, bool canonical, const std::vector<Range>& ranges) {
  if (dc.empty() || dc.size() > jpeg::kMaxComponents || ac.size() != dc.size() ||
      (!ranges.empty() && ranges.size() != dc.size()))
    throw UserFault(std::to_string(dc.size()) + " components", "must be 1 to 4, each with its tables and ranges");
  for (const int component : blocks)
    if (component < 0 || component >= static_cast<int>(dc.size()))
      throw UserFault("block of component " + std::to_string(component), "must be of a component that there is");
  if (blocks.empty() || blocks.size() > 10 || mcus < 1 || mcus > 1 << 30 || interval < 0)
    throw UserFault(std::to_string(blocks.size()) + " blocks, " + std::to_string(mcus) + " MCUs, restart interval " +
                        std::to_string(interval),
                    "must be 1 to 10 blocks, at least 1 MCU, and an interval of 0 or more");
  jpeg::ScanLayout layout{std::move(blocks), tables(dc), tables(ac), mcus, interval, canonical, {}};
  for (const auto& [low, high] : ranges) layout.ranges.push_back({low, high});
  return Scan(std::move(layout));
}

// Where in the scan, for a message: MCU, block of it, coefficient.
py::tuple place(const Scan& scan, const Position& at) {
  return py::make_tuple(at.mcus, scan.block(at), scan.coefficient(at));
}

// The first byte that is refused, or where more bytes are missing, as (why, offset, place); None for a whole scan.
py::object check(const Scan& scan, std::string_view bytes) {
  Position at;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const Fault fault = scan.step(at, static_cast<std::uint8_t>(bytes[i]));
    if (fault != Fault::kNone) return py::make_tuple(fault, i, place(scan, at));
  }
  if (at.phase == Position::kDone) return py::none();
  return py::make_tuple(Fault::kNone, bytes.size(), place(scan, at));
}

// For each complete MCU of a scan's beginning, how many bytes hold nothing of a later one: those up to its marker, or,
// where none is due, up to the byte that it shares with the next. Ends at the first byte that is refused.
std::vector<std::size_t> mcu_ends(const Scan& scan, std::string_view bytes) {
  std::vector<std::size_t> ends;
  Position at;
  bool open = false;  // bytes that belong to the last MCU are still to come: a stuffed 00, a marker
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const std::int32_t before = at.mcus;
    if (scan.step(at, static_cast<std::uint8_t>(bytes[i])) != Fault::kNone) break;
    for (std::int32_t mcu = before; mcu < at.mcus; ++mcu) {
      // More than one MCU can end in a byte; only the last of them can end with it.
      const bool shared = at.state != 0 || mcu + 1 < at.mcus;
      ends.push_back(shared ? i : i + 1);
      open = !shared;
    }
    if (!open) continue;
    ends.back() = i + 1;
    open = at.phase != Position::kData && at.phase != Position::kDone;
  }
  if (open) ends.pop_back();
  return ends;
}

// Reads bytes; the fault, and how many were read before it. The cursor stays where it was after a fault.
py::tuple read_bytes(const Grammar& grammar, Cursor& at, std::string_view bytes) {
  Cursor then = at;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const Fault fault = grammar.step(then, static_cast<std::uint8_t>(bytes[i]));
    if (fault != Fault::kNone) return py::make_tuple(fault, i, place(grammar.scan(), then.scan));
  }
  at = then;
  return py::make_tuple(Fault::kNone, bytes.size(), place(grammar.scan(), then.scan));
}

void allow(Grammar& grammar, const std::vector<const Cursor*>& cursors, const std::vector<long>& left,
           std::uintptr_t rows, std::size_t stride) {
  for (std::size_t i = 0; i < cursors.size(); ++i)
    grammar.allow(*cursors[i], left.at(i), reinterpret_cast<std::uint8_t*>(rows) + i * stride);
}

}  // namespace

void bind_jpeg(py::module_& module) {
  py::enum_<Fault>(module, "JpegFault", "Why a byte of a JPEG scan is refused; csrc/jpeg_scan.hpp.")
      .value("NONE", Fault::kNone)
      .value("CODE", Fault::kCode)
      .value("RANGE", Fault::kRange)
      .value("STUFFING", Fault::kStuffing)
      .value("PADDING", Fault::kPadding)
      .value("MARKER", Fault::kMarker)
      .value("AFTER_END", Fault::kAfterEnd)
      .value("HEAD", Fault::kHead);
  py::class_<Scan>(module, "JpegScan", "The scan of a baseline JPEG as an automaton; csrc/jpeg_scan.hpp.")
      .def(py::init(&make_scan), py::arg("blocks"), py::arg("dc"), py::arg("ac"), py::arg("mcus"),
           py::arg("interval"), py::arg("canonical"), py::arg("ranges"))
      .def("check", &check, py::arg("scan"))
      .def("mcu_ends", &mcu_ends, py::arg("scan"))
      .def_property_readonly("states", &Scan::states);
  py::class_<Cursor>(module, "JpegCursor", "Where a stream stands.")
      .def("copy", [](const Cursor& at) { return at; })
      .def_property_readonly("mcus", [](const Cursor& at) { return at.scan.mcus; });
  py::class_<Grammar>(module, "JpegGrammar", "Which tokens can follow in a JPEG; csrc/jpeg_grammar.hpp.")
      .def(py::init([](const Scan& scan, const py::bytes& head, const std::vector<py::bytes>& tokens,
                       std::size_t memory) {
             return Grammar(scan, head, {tokens.begin(), tokens.end()}, memory);
           }),
           py::arg("scan"), py::arg("head"), py::arg("tokens"), py::arg("memory"))
      .def("begin", [](const Grammar&) { return Cursor{}; })
      .def("read", &Grammar::read, py::arg("at"), py::arg("token"))
      .def("read_bytes", &read_bytes, py::arg("at"), py::arg("stream"))
      .def("done", &Grammar::done, py::arg("at"))
      .def("finish", &Grammar::finish, py::arg("at"))
      .def("allow", &allow, py::arg("cursors"), py::arg("left"), py::arg("rows"), py::arg("stride"))
      .def_property_readonly("rows", &Grammar::rows)
      .def_property_readonly("memory", &Grammar::memory);
}
