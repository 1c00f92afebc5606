#pragma once

#include <pybind11/pybind11.h>

namespace k2 {

void bind_latent_step(pybind11::module_& m);

}  // namespace k2
