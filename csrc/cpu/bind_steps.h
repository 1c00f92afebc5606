#pragma once

#include <pybind11/pybind11.h>

namespace k2 {

void bind_steps(pybind11::module_& m);

}  // namespace k2
