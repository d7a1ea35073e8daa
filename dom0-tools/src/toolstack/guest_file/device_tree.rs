//! What a guest of a file has to be told of its devices.

use super::{DIRECTORY, FIRST_SHARED, FileDevice};
use crate::toolstack::libxl;
use std::collections::BTreeSet;
use std::fmt::Write;
use virtio_bindings::virtio_ids::VIRTIO_ID_SCMI;

/// The guest's interrupt controller in its device tree (`GUEST_PHANDLE_GIC`).
const GIC_PHANDLE: u32 = 65000;

/// The source of the partial device tree with which a guest finds `devices`, for `device_tree=` of xl and the like.
pub fn device_tree(name: &str, devices: &[FileDevice]) -> String {
    let interrupts: BTreeSet<u32> = devices.iter().map(|device| device.interrupt).collect();
    let shared = interrupts.last().map_or(0, |last| last + 1 - FIRST_SHARED);
    let mut text = format!(
        "/* The virtio devices of guest {name}, by {DIRECTORY}/{name}.toml.\n\
         \x20* dtc -q -I dts -O dtb -o {name}.dtb FILE; in its xl file: device_tree = \"{name}.dtb\", and nr_spis = {shared} (Xen 4.19\n\
         \x20* and later; before, vuart = \"sbsa_uart\" gives the guest 32 shared interrupts). */\n\
         /dts-v1/;\n\n/ {{\n    #address-cells = <2>;\n    #size-cells = <2>;\n\n    passthrough {{\n        \
         compatible = \"simple-bus\";\n        ranges;\n        #address-cells = <2>;\n        #size-cells = <2>;\n"
    );
    if devices.iter().any(|device| device.grant_usage) {
        text.push_str(
            "\n        grants: xen_iommu {\n            compatible = \"xen,grant-dma\";\n            \
             #iommu-cells = <1>;\n        };\n",
        );
    }
    for device in devices {
        let FileDevice {
            base, interrupt, ..
        } = device;
        let (high, low) = (base >> 32, base & u64::from(u32::MAX));
        let number = interrupt - FIRST_SHARED;
        // 0: a shared interrupt; 1: its rising edges.
        let _ = write!(
            text,
            "\n        virtio@{base:x} {{\n            compatible = \"virtio,mmio\";\n            \
             reg = <{high:#x} {low:#x} 0x0 {:#x}>;\n            interrupt-parent = <{GIC_PHANDLE}>;\n            \
             interrupts = <0 {number} 1>;\n            dma-coherent;\n",
            libxl::PAGE_LEN
        );
        if device.grant_usage {
            // 0: the domain that the pages are granted to.
            text.push_str("            iommus = <&grants 0>;\n");
        }
        text.push_str("        };\n");
    }
    // Linux looks for such a device here, not among the virtio devices (`arm,scmi.yaml`); 0x15 is its sensors.
    if devices
        .iter()
        .any(|device| device.device_type == VIRTIO_ID_SCMI)
    {
        text.push_str(
            "\n        scmi {\n            compatible = \"arm,scmi-virtio\";\n            #address-cells = <1>;\n            \
             #size-cells = <0>;\n\n            protocol@15 {\n                reg = <0x15>;\n                \
             #thermal-sensor-cells = <1>;\n            };\n        };\n",
        );
    }
    text.push_str("    };\n};\n");
    text
}
