// What a CPU build of torch lacks for tensors that say cuda:0: a device guard, hooks, and the choice of attention.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/FakeGuardImpl.h>

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {

struct CUDAHooks : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
};

// torch has asked for its hooks by now, and keeps what it got; these take that object's place in memory.
static_assert(sizeof(CUDAHooks) == sizeof(CUDAHooksInterface));
static auto* const hooks =
    new (const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks())) CUDAHooks(CUDAHooksArgs());

namespace native {

// As CUDA chooses without cuDNN: flash attention takes 16 bits and no mask, the memory-efficient kernel the rest.
static int64_t choose(
    const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool,
    std::optional<double>, bool) {
  bool flash = query.scalar_type() != kFloat && !mask.has_value();
  return static_cast<int64_t>(flash ? sdp::SDPBackend::flash_attention : sdp::SDPBackend::efficient_attention);
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose)

} // namespace native
} // namespace at
