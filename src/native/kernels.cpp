// The kernels of one instruction set: compiled once for each, with -DKVANT_ISA=<name>.

#include "attend.hpp"
#include "encode.hpp"
#include "linear.hpp"
#include "ops.hpp"

#define KVANT_NAME_(isa) kernels_##isa
#define KVANT_NAME(isa) KVANT_NAME_(isa)
#define KVANT_STRING_(isa) #isa
#define KVANT_STRING(isa) KVANT_STRING_(isa)

namespace kvant {

extern const Kernels KVANT_NAME(KVANT_ISA);
const Kernels KVANT_NAME(KVANT_ISA) = {
    KVANT_STRING(KVANT_ISA), write_group, write_scratch, attend_item, finish_tile, attend_scratch,
    prepared_bytes, prepare_scratch, prepare_rows, multiply_rows, rope,
};

}  // namespace kvant
