// A fault of the caller, raised in Python as megatron_codec.errors.UserError.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

struct UserFault : std::runtime_error {
  UserFault(std::string value, std::string rule, std::string remedy = "")
      : std::runtime_error(value + ": " + rule),
        value(std::move(value)),
        rule(std::move(rule)),
        remedy(std::move(remedy)) {}

  std::string value, rule, remedy;
};
