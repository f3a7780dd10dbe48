// CUDA tensors without a card: kernels for torch's CUDA dispatch key that run on the processor, in the CPU build.
//
// A tensor made here says `cuda:N`, takes torch's own CUDA code path (dispatch, autograd's device threads, autocast,
// collectives) and holds ordinary memory. Every operator looks at the devices of what it is given first and raises as a
// real card would when they differ; then it runs the processor's kernel on aliases of the same memory. Whatever would
// make the host wait for a card is reported to a listener.

#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

DeviceIndex num_devices = 1;
thread_local DeviceIndex current_device = 0;

Device cuda(DeviceIndex index) {
  return Device(DeviceType::CUDA, index < 0 ? current_device : index);
}

// --- What makes the host wait -------------------------------------------------------------------------------------------

// Leaked on purpose: the interpreter may be gone when static objects are destroyed.
py::object* listener = nullptr;

void tell(const char* kind, const std::string& what, int64_t bytes) {
  if (listener == nullptr) {
    return;
  }
  py::gil_scoped_acquire gil;
  (*listener)(kind, what, bytes);
}

void host_waits(const std::string& why) {
  tell("wait", why, 0);
}

// --- Memory --------------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated{0};
std::atomic<int64_t> peak{0};

void count_bytes(int64_t bytes) {
  int64_t now = (allocated += bytes);
  int64_t highest = peak.load();
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {
  }
}

// A block of "device" memory: its own, or the storage of a processor's result that it keeps alive.
struct Block {
  void* own = nullptr;
  c10::Storage result;
  int64_t bytes = 0;

  ~Block() {
    std::free(own);
    count_bytes(-bytes);
  }
};

void free_block(void* block) {
  delete static_cast<Block*>(block);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block();
    if (bytes > 0) {
      block->own = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    }
    block->bytes = static_cast<int64_t>(bytes);
    count_bytes(block->bytes);
    return {block->own, block, &free_block, cuda(-1)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

DeviceAllocator device_allocator;

// Pinned memory is ordinary memory whose address is remembered.
std::mutex pinned_lock;
std::map<uintptr_t, size_t> pinned_blocks;

bool is_pinned(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned_blocks.upper_bound(address);
  if (after == pinned_blocks.begin()) {
    return false;
  }
  --after;
  return address < after->first + after->second;
}

void free_pinned(void* pointer) {
  {
    const std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_blocks.erase(reinterpret_cast<uintptr_t>(pointer));
  }
  std::free(pointer);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
    const std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_blocks[reinterpret_cast<uintptr_t>(pointer)] = std::max<size_t>(bytes, 1);
    return {pointer, pointer, &free_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_pinned;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

PinnedAllocator pinned_allocator;

// --- Devices and streams -------------------------------------------------------------------------------------------------

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override {
    return DeviceType::CUDA;
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override {
    return cuda(-1);
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(
        device.index() < num_devices, "CUDA error: invalid device ordinal ", device, " (", int(num_devices), " devices)");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) {
      current_device = device.index();
    }
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, cuda(device.index()));
  }
  c10::Stream getDefaultStream(Device device) const override {
    return getStream(device);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  DeviceIndex deviceCount() const noexcept override {
    return num_devices;
  }
  // Work is done when a call returns, so every event has happened.
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    host_waits("synchronize");
  }
  void synchronizeEvent(void*) const override {
    host_waits("synchronize");
  }
  void synchronizeDevice(const DeviceIndex) const override {
    host_waits("synchronize");
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override {
    return 0.0;
  }
};

struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return num_devices;
  }
  int getNumGPUs() const override {
    return num_devices;
  }
  DeviceIndex current_device() const override {
    return ::current_device;
  }
  void setCurrentDevice(DeviceIndex index) const override {
    ::current_device = index;
  }
  DeviceIndex getCurrentDevice() const override {
    return ::current_device;
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(::current_device, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return std::exchange(::current_device, index);
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
  c10::Allocator* getCUDADeviceAllocator() const override {
    return &device_allocator;
  }
  Device getDeviceFromPtr(void*) const override {
    return cuda(-1);
  }
  void deviceSynchronize(DeviceIndex) const override {
    host_waits("synchronize");
  }
};

// --- Operators -----------------------------------------------------------------------------------------------------------

at::Tensor tensor_over(
    const c10::Storage& storage,
    DeviceType type,
    const at::Tensor& like) {
  auto key = type == DeviceType::CUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  return tensor;
}

void release_storage(void* storage) {
  delete static_cast<c10::Storage*>(storage);
}

// The call of one operator: what its arguments are called on the processor, and what its results are called on the card.
class Call {
 public:
  explicit Call(Device device) : device_(device) {}

  at::Tensor to_processor(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != DeviceType::CUDA) {
      return tensor;
    }
    const auto& storage = tensor.storage();
    auto* key = storage.unsafeGetStorageImpl();
    auto found = to_processor_.find(key);
    if (found == to_processor_.end()) {
      auto* kept = new c10::Storage(storage);
      c10::DataPtr data(storage.mutable_data(), kept, &release_storage, Device(DeviceType::CPU));
      c10::Storage alias(
          c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(DeviceType::CPU), true);
      to_device_.emplace(alias.unsafeGetStorageImpl(), storage);
      found = to_processor_.emplace(key, std::move(alias)).first;
    }
    auto alias = tensor_over(found->second, DeviceType::CPU, tensor);
    originals_.emplace_back(alias, tensor);
    return alias;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != DeviceType::CPU) {
      return tensor;
    }
    for (const auto& [alias, original] : originals_) {
      if (alias.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) {
        return original;
      }
    }
    return tensor_over(device_storage(tensor.storage()), DeviceType::CUDA, tensor);
  }

  // Arguments that the operator resized or gave new memory: outputs that were passed in empty, mostly.
  void carry_over_resizes() {
    for (auto& [alias, original] : originals_) {
      auto* impl = original.unsafeGetTensorImpl();
      const bool moved = alias.storage().data() != original.storage().data() ||
          alias.storage().nbytes() != original.storage().nbytes();
      if (moved) {
        auto* block = new Block();
        block->bytes = static_cast<int64_t>(alias.storage().nbytes());
        count_bytes(block->bytes);
        block->result = alias.storage();
        auto* storage = original.storage().unsafeGetStorageImpl();
        storage->set_data_ptr(
            c10::DataPtr(alias.storage().mutable_data(), block, &free_block, original.device()));
        storage->set_nbytes(alias.storage().nbytes());
      }
      if (!alias.sizes().equals(original.sizes()) || !alias.strides().equals(original.strides()) ||
          alias.storage_offset() != original.storage_offset()) {
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
      }
    }
  }

 private:
  c10::Storage device_storage(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    auto found = to_device_.find(key);
    if (found == to_device_.end()) {
      auto* block = new Block();
      block->result = storage;
      block->bytes = static_cast<int64_t>(storage.nbytes());
      count_bytes(block->bytes);
      c10::DataPtr data(storage.mutable_data(), block, &free_block, device_);
      found = to_device_
                  .emplace(
                      key,
                      c10::Storage(
                          c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), &device_allocator, true))
                  .first;
    }
    return found->second;
  }

  Device device_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> to_processor_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> to_device_;
  std::vector<std::pair<at::Tensor, at::Tensor>> originals_;
};

// Calls a function with each tensor of an operator's arguments, in lists too, and puts back what it returns.
template <typename Function>
c10::IValue map_tensors(const c10::IValue& value, const Function& function) {
  if (value.isTensor()) {
    return function(value.toTensor());
  }
  if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& tensor : list) {
      tensor = function(tensor);
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& element : value.toOptionalTensorList()) {
      const std::optional<at::Tensor> tensor = element;
      list.push_back(tensor.has_value() ? std::optional<at::Tensor>(function(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value;
}

// Operators in which a card takes positions that lie on the host; Python's indexing copies them there first.
bool takes_host_indices(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
      "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

// Operators whose result's size or value the host has to know.
bool makes_host_wait(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero_static", "aten::masked_select", "aten::_unique2",
      "aten::_unique", "aten::unique_dim", "aten::unique_consecutive", "aten::equal", "aten::bincount",
      "aten::repeat_interleave", "aten::multinomial"};
  return names.count(name) > 0;
}

void check_devices(const std::string& name, const std::vector<at::Tensor>& tensors, Device device) {
  const bool host_indices = takes_host_indices(name);
  for (size_t place = 0; place < tensors.size(); ++place) {
    const auto& tensor = tensors[place];
    if (tensor.device() == device || tensor.device().type() == DeviceType::Meta ||
        (tensor.device().type() == DeviceType::CPU && tensor.dim() == 0)) {
      continue;
    }
    const bool is_index = c10::isIntegralType(tensor.scalar_type(), true);
    if (host_indices && place > 0 && is_index && tensor.device().type() == DeviceType::CPU) {
      continue;
    }
    TORCH_CHECK(
        false,
        "Expected all tensors to be on the same device, but found at least two devices, ",
        device,
        " and ",
        tensor.device(),
        "! (argument of shape ",
        tensor.sizes(),
        " of ",
        name,
        ")");
  }
}

// Values put where a mask says: the card counts the mask's ones first, and the host waits for their number.
void report_mask(const std::string& name, const std::vector<at::Tensor>& tensors) {
  if (name != "aten::index_put_" && name != "aten::_index_put_impl_") {
    return;
  }
  const bool has_mask = std::any_of(tensors.begin() + 1, tensors.end() - 1, [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
  });
  if (has_mask && tensors.back().numel() > 1) {
    host_waits("size of a mask in " + name);
  }
}

void run_on_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t num_arguments = schema.arguments().size();
  const size_t first = stack->size() - num_arguments;

  std::vector<at::Tensor> tensors;
  Device device = cuda(-1);
  bool found_device = false;
  for (size_t place = first; place < stack->size(); ++place) {
    const c10::IValue& value = (*stack)[place];
    map_tensors(value, [&](const at::Tensor& tensor) {
      if (tensor.defined()) {
        tensors.push_back(tensor);
        if (!found_device && tensor.device().type() == DeviceType::CUDA) {
          device = tensor.device();
          found_device = true;
        }
      }
      return tensor;
    });
    if (value.isDevice() && !found_device) {
      device = cuda(value.toDevice().index());
    }
  }
  if (found_device) {
    check_devices(name, tensors, device);
    report_mask(name, tensors);
  }
  if (makes_host_wait(name)) {
    host_waits(name);
  }

  Call call(device);
  for (size_t place = first; place < stack->size(); ++place) {
    c10::IValue& value = (*stack)[place];
    if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    } else if (schema.arguments()[place - first].name() == "pin_memory") {
      value = c10::IValue();
    } else if (value.isGenerator() && value.toGenerator().device().type() == DeviceType::CUDA) {
      value = c10::IValue();
    } else {
      value = map_tensors(value, [&](const at::Tensor& tensor) { return call.to_processor(tensor); });
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.carry_over_resizes();
  for (size_t place = stack->size() - schema.returns().size(); place < stack->size(); ++place) {
    (*stack)[place] =
        map_tensors((*stack)[place], [&](const at::Tensor& tensor) { return call.to_device(tensor); });
  }
}

at::Tensor alias_on_processor(const at::Tensor& tensor) {
  Call call(tensor.device());
  return call.to_processor(tensor);
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const bool from_host = source.device().type() == DeviceType::CPU;
  const bool to_host = self.device().type() == DeviceType::CPU;
  if (source.device().type() == DeviceType::Meta) {
    return self;
  }
  if (from_host || to_host) {
    const auto& host = from_host ? source : self;
    if (!non_blocking || !is_pinned(host.storage().data())) {
      std::ostringstream text;
      text << (from_host ? "copy to the device of " : "copy to the host of ") << source.dtype() << source.sizes();
      host_waits(text.str());
    }
  }
  auto target = alias_on_processor(self);
  target.copy_(alias_on_processor(source));
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "set_: storage on ", source.device(), ", tensor on ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !sizes.empty()) {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, c10::SymIntArrayRef({c10::SymInt(size)}), {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  TORCH_CHECK(source.device() == self.device(), "set_: ", source.device(), " given to ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

// torch picks the fused kernel by device through tables that only a CUDA build fills.
at::Tensor scaled_dot_product_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const std::optional<at::Tensor>& mask,
    double dropout,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  auto bias = mask;
  if (mask.has_value() && mask->defined() && mask->scalar_type() == at::kBool) {
    bias = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, bias, dropout, is_causal, std::nullopt, scale, enable_gqa));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_processor>());
}

void record_stream(at::Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) {
  m.impl("scaled_dot_product_attention", TORCH_FN(scaled_dot_product_attention));
}

// --- Collectives ---------------------------------------------------------------------------------------------------------

// A collective under way, whose future holds the tensors on the card.
struct DeviceWork final : c10d::Work {
  DeviceWork(c10::intrusive_ptr<c10d::Work> inner, std::vector<at::Tensor> outputs)
      : inner_(std::move(inner)), outputs_(std::move(outputs)) {
    std::vector<Device> devices;
    for (const auto& tensor : outputs_) {
      if (std::find(devices.begin(), devices.end(), tensor.device()) == devices.end()) {
        devices.push_back(tensor.device());
      }
    }
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
    c10::intrusive_ptr<c10::ivalue::Future> inner_future;
    try {
      inner_future = inner_ == nullptr ? nullptr : inner_->getFuture();
    } catch (const c10::Error&) {
      inner_->wait();  // gloo has no future for some collectives
    }
    if (inner_future == nullptr) {
      future_->markCompleted(c10::IValue(outputs_));
      return;
    }
    inner_future->addCallback([future = future_, tensors = outputs_](c10::ivalue::Future& done) {
      if (done.hasError()) {
        future->setError(done.exception_ptr());
      } else {
        future->markCompleted(c10::IValue(tensors));
      }
    });
  }
  bool isCompleted() override {
    return inner_ == nullptr || inner_->isCompleted();
  }
  bool isSuccess() const override {
    return inner_ == nullptr || inner_->isSuccess();
  }
  bool wait(std::chrono::milliseconds timeout) override {
    return inner_ == nullptr || inner_->wait(timeout);
  }
  void synchronize() override {
    if (inner_ != nullptr) {
      inner_->wait();
    }
  }
  std::vector<at::Tensor> result() override {
    return outputs_;
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    return future_;
  }

 private:
  c10::intrusive_ptr<c10d::Work> inner_;
  std::vector<at::Tensor> outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// Stands where NCCL does: takes tensors on a card only, and lets gloo carry them.
class DeviceBackend final : public c10d::Backend {
 public:
  DeviceBackend(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override {
    return "nccl";
  }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override {
    return sequence_;
  }
  void setTimeout(std::chrono::milliseconds timeout) override {
    gloo_->setTimeout(timeout);
  }

  c10::intrusive_ptr<c10d::Work> broadcast(
      std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    auto on_host = aliases(tensors);
    return started(gloo_->broadcast(on_host, options), tensors);
  }
  c10::intrusive_ptr<c10d::Work> allreduce(
      std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    tell_reduction(tensors);
    auto on_host = aliases(tensors);
    auto plain = options;
    const bool average = options.reduceOp == c10d::ReduceOp::AVG;
    if (average) {
      plain.reduceOp = c10d::ReduceOp::SUM;
    }
    auto work = gloo_->allreduce(on_host, plain);
    return started(average ? averaged(work, on_host) : work, tensors);
  }
  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(
      std::vector<at::Tensor>& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    tell_reduction(tensors);
    auto on_host = aliases(tensors);
    return started(gloo_->allreduce_coalesced(on_host, options), tensors);
  }
  c10::intrusive_ptr<c10d::Work> reduce(
      std::vector<at::Tensor>& tensors, const c10d::ReduceOptions& options) override {
    tell_reduction(tensors);
    auto on_host = aliases(tensors);
    return started(gloo_->reduce(on_host, options), tensors);
  }
  c10::intrusive_ptr<c10d::Work> allgather(
      std::vector<std::vector<at::Tensor>>& outputs,
      std::vector<at::Tensor>& inputs,
      const c10d::AllgatherOptions& options) override {
    auto on_host = aliases(outputs);
    auto inputs_on_host = aliases(inputs);
    return started(gloo_->allgather(on_host, inputs_on_host, options), flat(outputs));
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(
      at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto on_host = alias(output);
    auto input_on_host = alias(input);
    return started(gloo_->_allgather_base(on_host, input_on_host, options), {output});
  }
  c10::intrusive_ptr<c10d::Work> allgather_into_tensor_coalesced(
      std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs, const c10d::AllgatherOptions& options) override {
    for (size_t place = 0; place < outputs.size(); ++place) {
      _allgather_base(outputs[place], inputs[place], options)->wait();
    }
    return started(nullptr, outputs);
  }
  c10::intrusive_ptr<c10d::Work> reduce_scatter(
      std::vector<at::Tensor>& outputs,
      std::vector<std::vector<at::Tensor>>& inputs,
      const c10d::ReduceScatterOptions& options) override {
    tell_reduction(flat(inputs));
    auto on_host = aliases(outputs);
    auto inputs_on_host = aliases(inputs);
    return started(summed_then_averaged(options, on_host, [&](const c10d::ReduceScatterOptions& plain) {
      return gloo_->reduce_scatter(on_host, inputs_on_host, plain);
    }), outputs);
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    tell_reduction({input});
    std::vector<at::Tensor> on_host = {alias(output)};
    auto input_on_host = alias(input);
    return started(summed_then_averaged(options, on_host, [&](const c10d::ReduceScatterOptions& plain) {
      return gloo_->_reduce_scatter_base(on_host[0], input_on_host, plain);
    }), {output});
  }
  c10::intrusive_ptr<c10d::Work> reduce_scatter_tensor_coalesced(
      std::vector<at::Tensor>& outputs,
      std::vector<at::Tensor>& inputs,
      const c10d::ReduceScatterOptions& options) override {
    for (size_t place = 0; place < outputs.size(); ++place) {
      _reduce_scatter_base(outputs[place], inputs[place], options)->wait();
    }
    return started(nullptr, outputs);
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    auto on_host = alias(output);
    auto input_on_host = alias(input);
    return started(gloo_->alltoall_base(on_host, input_on_host, output_sizes, input_sizes, options), {output});
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override {
    host_waits("barrier");
    ++sequence_;
    auto plain = options;
    plain.device = std::nullopt;
    plain.device_ids.clear();
    return gloo_->barrier(plain);
  }

 private:
  static at::Tensor alias(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == DeviceType::CUDA, "No backend type associated with device type cpu");
    return alias_on_processor(tensor);
  }
  static std::vector<at::Tensor> aliases(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> result;
    for (const auto& tensor : tensors) {
      result.push_back(alias(tensor));
    }
    return result;
  }
  static std::vector<std::vector<at::Tensor>> aliases(const std::vector<std::vector<at::Tensor>>& lists) {
    std::vector<std::vector<at::Tensor>> result;
    for (const auto& list : lists) {
      result.push_back(aliases(list));
    }
    return result;
  }
  static std::vector<at::Tensor> flat(const std::vector<std::vector<at::Tensor>>& lists) {
    std::vector<at::Tensor> result;
    for (const auto& list : lists) {
      result.insert(result.end(), list.begin(), list.end());
    }
    return result;
  }
  c10::intrusive_ptr<c10d::Work> averaged(
      const c10::intrusive_ptr<c10d::Work>& work, std::vector<at::Tensor>& on_host) {
    work->wait();
    for (auto& tensor : on_host) {
      tensor.div_(size_);
    }
    return nullptr;
  }
  template <typename Start>
  c10::intrusive_ptr<c10d::Work> summed_then_averaged(
      const c10d::ReduceScatterOptions& options, std::vector<at::Tensor>& on_host, const Start& start) {
    auto plain = options;
    if (options.reduceOp != c10d::ReduceOp::AVG) {
      return start(plain);
    }
    plain.reduceOp = c10d::ReduceOp::SUM;
    return averaged(start(plain), on_host);
  }
  // Sums over ranks, by the bytes that each rank gives.
  static void tell_reduction(const std::vector<at::Tensor>& inputs) {
    int64_t bytes = 0;
    for (const auto& tensor : inputs) {
      bytes += static_cast<int64_t>(tensor.nbytes());
    }
    tell("reduction", "", bytes);
  }
  c10::intrusive_ptr<c10d::Work> started(c10::intrusive_ptr<c10d::Work> inner, std::vector<at::Tensor> outputs) {
    ++sequence_;
    return c10::make_intrusive<DeviceWork>(std::move(inner), std::move(outputs));
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  uint64_t sequence_ = 0;
};

void install(int count) {
  num_devices = static_cast<DeviceIndex>(count);
  static const c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new GuardImpl());
  c10::SetAllocator(DeviceType::CUDA, &device_allocator, 10);
}

} // namespace

namespace at {
struct StandinCUDAHooks final : Hooks {
  explicit StandinCUDAHooks(CUDAHooksArgs) {}
};
// The registry asks for this name when torch first wants to know about CUDA.
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", StandinCUDAHooks)
} // namespace at

namespace c10d {
// DDP's own clock; work is done when a call returns, so the host's time is the device's.
struct StandinTimer final : Timer {
  explicit StandinTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimestamp(start);
    const auto to = getTimestamp(end);
    return from.has_value() && to.has_value() && *to >= *from ? std::optional<int64_t>(*to - *from) : std::nullopt;
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, StandinTimer)
} // namespace c10d

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install);
  m.def("is_cuda_known", [] { return at::detail::getCUDAHooks().hasCUDA(); });
  m.def("listen", [](py::object function) {
    delete std::exchange(listener, function.is_none() ? nullptr : new py::object(std::move(function)));
  });
  m.def("report_wait", &host_waits);
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int index) { GuardImpl().setDevice(cuda(static_cast<DeviceIndex>(index))); });
  m.def("memory", [] { return std::make_pair(allocated.load(), peak.load()); });
  m.def("reset_peak", [] { peak.store(allocated.load()); });
  m.def("make_backend", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<DeviceBackend>(std::move(gloo), rank, size);
  });
}
