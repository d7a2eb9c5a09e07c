// librocm_smi64: the simulated machine's topology, in which every device has a link to every other.
#include <rocm_smi/rocm_smi.h>

#include <cstdlib>

namespace {

// The devices of the machine: HIP_VISIBLE_DEVICES does not hide any from this library.
uint32_t count() {
  const char* text = std::getenv("ROCM_SIM_DEVICES");
  return text == nullptr ? 1 : static_cast<uint32_t>(std::strtoul(text, nullptr, 10));
}

bool are_devices(uint32_t one, uint32_t other) { return one < count() && other < count(); }

constexpr uint64_t kHops = 1;
constexpr uint64_t kXgmiWeight = 15;
constexpr uint64_t kHive = 1;

}  // namespace

extern "C" {

rsmi_status_t rsmi_init(uint64_t) { return RSMI_STATUS_SUCCESS; }

rsmi_status_t rsmi_shut_down() { return RSMI_STATUS_SUCCESS; }

rsmi_status_t rsmi_num_monitor_devices(uint32_t* devices) {
  *devices = count();
  return RSMI_STATUS_SUCCESS;
}

rsmi_status_t rsmi_dev_pci_id_get(uint32_t device, uint64_t* id) {
  if (!are_devices(device, device)) return RSMI_STATUS_INVALID_ARGS;
  // Bus, device and function as hipDeviceGetPCIBusId gives them.
  *id = uint64_t{device + 1} << 8;
  return RSMI_STATUS_SUCCESS;
}

rsmi_status_t rsmi_dev_xgmi_hive_id_get(uint32_t device, uint64_t* hive) {
  if (!are_devices(device, device)) return RSMI_STATUS_INVALID_ARGS;
  *hive = kHive;
  return RSMI_STATUS_SUCCESS;
}

rsmi_status_t rsmi_topo_get_link_type(uint32_t one, uint32_t other, uint64_t* hops,
                                      RSMI_IO_LINK_TYPE* type) {
  if (!are_devices(one, other)) return RSMI_STATUS_INVALID_ARGS;
  *hops = kHops;
  *type = RSMI_IOLINK_TYPE_XGMI;
  return RSMI_STATUS_SUCCESS;
}

rsmi_status_t rsmi_topo_get_link_weight(uint32_t one, uint32_t other, uint64_t* weight) {
  if (!are_devices(one, other)) return RSMI_STATUS_INVALID_ARGS;
  *weight = kXgmiWeight;
  return RSMI_STATUS_SUCCESS;
}

rsmi_status_t rsmi_is_P2P_accessible(uint32_t one, uint32_t other, bool* accessible) {
  if (!are_devices(one, other)) return RSMI_STATUS_INVALID_ARGS;
  *accessible = true;
  return RSMI_STATUS_SUCCESS;
}

rsmi_status_t rsmi_dev_gpu_metrics_info_get(uint32_t, rsmi_gpu_metrics_t*) {
  return RSMI_STATUS_NOT_SUPPORTED;
}

rsmi_status_t rsmi_status_string(rsmi_status_t status, const char** text) {
  *text = status == RSMI_STATUS_SUCCESS ? "success" : "not simulated";
  return RSMI_STATUS_SUCCESS;
}

}  // extern "C"
