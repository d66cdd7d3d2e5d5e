// The operator of row_update.h.
#include <torch/library.h>

#include "row_update.h"

namespace gr::row_update {
namespace {

void row_update(const at::Tensor& weight, const std::vector<at::Tensor>& states, const at::Tensor& ids, const at::Tensor& order,
                const at::Tensor& gradient, int64_t rule, at::ArrayRef<double> numbers, at::IntArrayRef draws) {
  TORCH_CHECK_VALUE(weight.is_contiguous() && gradient.is_contiguous(), "weight and gradient must be contiguous");
  for (const at::Tensor& state : states)
    TORCH_CHECK_VALUE(state.is_contiguous() && state.size(0) == weight.size(0), "states must be contiguous, with the rows of the table");
  const int64_t *id = ids.const_data_ptr<int64_t>(), *place = order.const_data_ptr<int64_t>(), count = ids.numel();
  const Batch batch{weight, gradient, states, id, place, count, weight.size(1), runs_of(id, count, weight.size(0))};
  Draws draw;
  if (!draws.empty())
    draw = {true, static_cast<uint64_t>(draws[0]), static_cast<uint64_t>(draws[1]), static_cast<uint64_t>(draws[2]),
            static_cast<uint64_t>(draws[3])};
  update_rows(rule, batch, Numbers(numbers), draw);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "row_update(Tensor(a!) weight, Tensor(b!)[] states, Tensor ids, Tensor order, Tensor gradient, int rule, "
      "float[] numbers, int[] draws) -> ()");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) { m.impl("row_update", &row_update); }

}  // namespace gr::row_update
