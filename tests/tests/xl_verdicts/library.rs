//! The installed libxlutil, by which xl reads its files, and libxenlight, which says what was read.

use nix::libc::{FILE, RTLD_NOW, dlopen, dlsym, fopen};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::{mem, ptr, slice};
use xen_virtio_dom0_tools::ctl::xl_config::Value;

/// Words that hold a `libxl_device_disk` of any version: libxenlight alone knows its fields, and has 200
/// bytes of them.
const DISK_WORDS: usize = 256;

/// `XLU_STRING`
const TYPE_TEXT: c_int = 0;

/// `XLU_Config`
type Config = *mut c_void;
/// `XLU_ConfigList`
type List = *mut c_void;
/// `XLU_ConfigValue`
type Item = *mut c_void;
/// `libxl_device_disk`
type Disk = *mut c_void;
/// `yajl_gen`
type Generator = *mut c_void;

pub(crate) struct Library {
    /// Of Xen 4.x.
    pub(crate) minor: u32,
    /// Where it writes its errors to.
    report: *mut FILE,
    config_init: unsafe extern "C" fn(*mut FILE, *const c_char) -> Config,
    config_read: unsafe extern "C" fn(Config, *const c_char, c_int) -> c_int,
    config_destroy: unsafe extern "C" fn(Config),
    get_text: unsafe extern "C" fn(Config, *const c_char, *mut *const c_char, c_int) -> c_int,
    get_list: unsafe extern "C" fn(Config, *const c_char, *mut List, *mut c_int, c_int) -> c_int,
    list_item: unsafe extern "C" fn(List, c_int) -> Item,
    item_type: unsafe extern "C" fn(Item) -> c_int,
    item_text: unsafe extern "C" fn(Config, Item, *mut *mut c_char, c_int) -> c_int,
    item_list: unsafe extern "C" fn(Config, Item, *mut List, c_int) -> c_int,
    disk_init: unsafe extern "C" fn(Disk),
    disk_parse: unsafe extern "C" fn(Config, c_int, *const *const c_char, Disk) -> c_int,
    disk_json: unsafe extern "C" fn(Generator, Disk) -> c_int,
    disk_dispose: unsafe extern "C" fn(Disk),
    json_alloc: unsafe extern "C" fn(*const c_void) -> Generator,
    json_text: unsafe extern "C" fn(Generator, *mut *const u8, *mut usize) -> c_int,
    json_free: unsafe extern "C" fn(Generator),
}

impl Library {
    /// The newest one that is installed.
    pub(crate) fn load() -> Self {
        let found = (17..60).rev().find_map(|minor| {
            let util = open(&format!("libxlutil.so.4.{minor}"))?;
            let light = open(&format!("libxenlight.so.4.{minor}"))?;
            Some((minor, util, light))
        });
        let (minor, util, light) =
            found.expect("no libxlutil.so.4.x is installed: apt-get install libxen-dev");
        let yajl = open("libyajl.so.2").expect("no libyajl.so.2: apt-get install libyajl2");
        // SAFETY: both are C strings.
        let report = unsafe { fopen(c"/dev/null".as_ptr(), c"w".as_ptr()) };
        assert!(!report.is_null(), "/dev/null cannot be opened");
        // SAFETY: the types of the fields are those of libxlutil.h, libxl.h, libxl_json.h and yajl_gen.h;
        // an enum is an int, and a pointer to a structure is one to void.
        unsafe {
            Self {
                minor,
                report,
                config_init: function(util, c"xlu_cfg_init"),
                config_read: function(util, c"xlu_cfg_readdata"),
                config_destroy: function(util, c"xlu_cfg_destroy"),
                get_text: function(util, c"xlu_cfg_get_string"),
                get_list: function(util, c"xlu_cfg_get_list"),
                list_item: function(util, c"xlu_cfg_get_listitem2"),
                item_type: function(util, c"xlu_cfg_value_type"),
                item_text: function(util, c"xlu_cfg_value_get_string"),
                item_list: function(util, c"xlu_cfg_value_get_list"),
                disk_init: function(light, c"libxl_device_disk_init"),
                disk_parse: function(util, c"xlu_disk_parse"),
                disk_json: function(light, c"libxl_device_disk_gen_json"),
                disk_dispose: function(light, c"libxl_device_disk_dispose"),
                json_alloc: function(yajl, c"yajl_gen_alloc"),
                json_text: function(yajl, c"yajl_gen_get_buf"),
                json_free: function(yajl, c"yajl_gen_free"),
            }
        }
    }

    /// What the settings `names` of an xl file are. `None` if the library refuses the file.
    pub(crate) fn settings(&self, file: &[u8], names: &[&str]) -> Option<BTreeMap<String, Value>> {
        let len = c_int::try_from(file.len()).expect("a short file");
        let mut settings = BTreeMap::new();
        // SAFETY: the stream is open, the file has `len` bytes, and the configuration is asked only after it
        // was read without an error, and before it is destroyed.
        unsafe {
            let config = (self.config_init)(self.report, c"corpus".as_ptr());
            assert!(!config.is_null(), "xlu_cfg_init");
            let is_read = (self.config_read)(config, file.as_ptr().cast(), len) == 0;
            if is_read {
                for name in names {
                    if let Some(value) = self.setting(config, name) {
                        settings.insert((*name).to_owned(), value);
                    }
                }
            }
            (self.config_destroy)(config);
            is_read.then_some(settings)
        }
    }

    /// # Safety
    ///
    /// `config` must have been read.
    unsafe fn setting(&self, config: Config, name: &str) -> Option<Value> {
        let name = CString::new(name).expect("a name has no NUL");
        let mut text: *const c_char = ptr::null();
        let mut list: List = ptr::null_mut();
        let mut count: c_int = 0;
        // SAFETY: the configuration is one by the caller, the name is a C string, and text and list are set
        // where 0 is returned.
        unsafe {
            if (self.get_text)(config, name.as_ptr(), &raw mut text, 1) == 0 {
                return Some(Value::Single(owned(text)));
            }
            let result = (self.get_list)(config, name.as_ptr(), &raw mut list, &raw mut count, 1);
            (result == 0).then(|| self.list(config, list))
        }
    }

    /// # Safety
    ///
    /// `list` must be one of `config`, which must have been read.
    unsafe fn list(&self, config: Config, list: List) -> Value {
        let mut values = Vec::new();
        for index in 0.. {
            let mut text: *mut c_char = ptr::null_mut();
            let mut inner: List = ptr::null_mut();
            // SAFETY: both are valid by the caller, an index past the end gives a null pointer, and text and
            // list are asked for where the type says so.
            unsafe {
                let item = (self.list_item)(list, index);
                if item.is_null() {
                    break;
                }
                values.push(if (self.item_type)(item) == TYPE_TEXT {
                    assert_eq!((self.item_text)(config, item, &raw mut text, 1), 0);
                    Value::Single(owned(text))
                } else {
                    assert_eq!((self.item_list)(config, item, &raw mut inner, 1), 0);
                    self.list(config, inner)
                });
            }
        }
        Value::List(values)
    }

    /// What a line of `disk = [ … ]` is, as libxl's JSON. `None` if the library refuses the line.
    pub(crate) fn disk(&self, line: &str) -> Option<Json> {
        let line = CString::new(line).expect("a line has no NUL");
        let lines = [line.as_ptr()];
        let mut words = [0_u64; DISK_WORDS];
        let disk: Disk = words.as_mut_ptr().cast();
        // SAFETY: there is room for a disk, aligned as its widest fields are; it is initialised before it is
        // set, and disposed of at last. The configuration serves for its stream alone.
        unsafe {
            let config = (self.config_init)(self.report, c"corpus".as_ptr());
            assert!(!config.is_null(), "xlu_cfg_init");
            (self.disk_init)(disk);
            let is_read = (self.disk_parse)(config, 1, lines.as_ptr(), disk) == 0;
            let json = is_read.then(|| self.json(disk));
            (self.disk_dispose)(disk);
            (self.config_destroy)(config);
            json
        }
    }

    /// # Safety
    ///
    /// `disk` must be one that was initialised.
    unsafe fn json(&self, disk: Disk) -> Json {
        let mut text: *const u8 = ptr::null();
        let mut len = 0_usize;
        // SAFETY: the disk is one by the caller; the text lives until its generator is freed.
        unsafe {
            let generator = (self.json_alloc)(ptr::null());
            assert!(!generator.is_null(), "yajl_gen_alloc");
            assert_eq!((self.disk_json)(generator, disk), 0);
            assert_eq!((self.json_text)(generator, &raw mut text, &raw mut len), 0);
            let json = serde_json::from_slice(slice::from_raw_parts(text, len)).expect("JSON");
            (self.json_free)(generator);
            json
        }
    }
}

fn open(name: &str) -> Option<*mut c_void> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a C string, and what these libraries do when they are loaded concerns nobody.
    let library = unsafe { dlopen(name.as_ptr(), RTLD_NOW) };
    (!library.is_null()).then_some(library)
}

/// The function `name` of a library that [`open`] gave.
///
/// # Safety
///
/// `F` must be the type of a pointer to it.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> F {
    // SAFETY: the library is never closed, and the name is a C string.
    let address = unsafe { dlsym(library, name.as_ptr()) };
    assert!(!address.is_null(), "{name:?} is missing");
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: it is a pointer by size, and by the caller one to such a function.
    unsafe { mem::transmute_copy(&address) }
}

/// # Safety
///
/// `text` must be a C string.
unsafe fn owned(text: *const c_char) -> String {
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
