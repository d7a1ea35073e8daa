//! Files and lines made of good ones and of their parts, by chance.

/// The same numbers from the same seed (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("64 bits hold it");
        usize::try_from(self.number() % bound).expect("below a usize")
    }

    fn one_of<'a>(&mut self, texts: &[&'a str]) -> &'a str {
        texts[self.below(texts.len())]
    }

    /// Puts one of `texts` somewhere into `text`, often in place of a character.
    fn change(&mut self, text: &mut String, texts: &[&str]) {
        let mut places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        places.push(text.len());
        let place = self.below(places.len());
        let start = places[place];
        let end = match self.below(3) {
            0 => start,
            _ => places.get(place + 1).copied().unwrap_or(start),
        };
        text.replace_range(start..end, self.one_of(texts));
    }
}

const SETTINGS: &[&str] = &[
    "a = 1\n",
    "a = 0x1f # c\n",
    "a += '2'\n",
    "b = [ 'x', \"y\" ]\n",
    "b += [ [ 1 ], 'z', ]\n",
    "b = [\n 1,\n\n 2\n];",
    "name = 'g'\n",
    "extra = \"a=b \\\"c\\\"\"\n",
    "disk = [ 'specification=virtio, vdev=xvda, target=/x' ]\n",
    "disk += [ '/y,raw,xvdb,r' ]\n",
    "virtio = [ ]\n",
    "memory=128;",
    "# c\n",
    "a = '\\101\\n'\n",
    "\n",
];

const FILE_PARTS: &[&str] = &[
    "a", "b", "=", "+=", "+", "'x'", "\"y\"", "1", "128", "M", "[", "]", ",", ";", "\n", " ", "\t",
    "#", "# c\n", "\r", "\r\n", "'it\\'s'", "\\", "\\1", "\\12", "\\x41", "\\n", "\\z", "'", "\"",
    "-", "a-b", "A", ".", "_", "é", "[ 'n' ]", "[]", "[[1]]", ",]", "\x0b", "!", ":",
];

/// An xl file.
pub(crate) fn file(random: &mut Random) -> String {
    let mut file = String::new();
    for _ in 0..random.below(5) {
        file += random.one_of(SETTINGS);
    }
    for _ in 0..random.below(4) {
        random.change(&mut file, FILE_PARTS);
    }
    file
}

const GOOD_LINES: &[&str] = &[
    "/x,raw,xvda,w",
    "/x,,xvda:cdrom,r",
    "phy:/x,xvda,r",
    "tap:qcow2:/x,xvda,w",
    "vdev=xvda, access=rw, target=/x",
    "backendtype=standalone, specification=virtio, vdev=xvda, access=ro, target=/x",
    "specification=virtio, /x, raw, xvda, w",
    "cdrom,vdev=xvda,format=empty",
    "script=s,backend=d,/x,qcow,xvdb",
    "discard,colo,no-colo,/x,vhd,xvda,ro",
    "specification=virtio,grant_usage=1,vdev=xvda,target=/x",
];

const LINE_PARTS: &[&str] = &[
    "vdev=xvda",
    "vdev=",
    "target=/x",
    "target=",
    "/x",
    "raw",
    "xvda",
    "w",
    "r",
    "format=raw",
    "format=qcow2",
    "format=",
    "backendtype=standalone",
    "backendtype=phy",
    "specification=virtio",
    "specification=xen",
    "access=r",
    "access=",
    "cdrom",
    "devtype=cdrom",
    "devtype=disk",
    "xvda:cdrom",
    ":disk",
    ":",
    "raw:",
    "phy:",
    "file:",
    "tap:aio:",
    "foo:",
    "iscsi:",
    "script=s",
    "backend=d",
    "colo",
    "colo-port=5",
    "colo-port=x",
    "discard",
    "foo=b",
    "foo=",
    "A",
    "",
    "=",
    "x",
    "é",
    "grant_usage=1",
    "grant_usage=",
    "trusted",
];

const SEPARATORS: &[&str] = &[
    ",", ",", ",", ",", ", ", ",, ", " ,", "", "\n", " ", "\t", ",,", ":", "=", ",\n", "\n,",
];

/// A line of `disk = [ … ]`.
pub(crate) fn line(random: &mut Random) -> String {
    let mut line = String::new();
    if random.below(4) != 0 {
        line += random.one_of(GOOD_LINES);
        for _ in 0..random.below(4) {
            let parts = if random.below(2) == 0 {
                LINE_PARTS
            } else {
                SEPARATORS
            };
            random.change(&mut line, parts);
        }
    }
    for _ in 0..random.below(6) {
        if random.below(3) == 0 {
            break;
        }
        let (separator, part) = (random.one_of(SEPARATORS), random.one_of(LINE_PARTS));
        let more = [part, separator].concat();
        let place = if random.below(2) == 0 { 0 } else { line.len() };
        line.insert_str(place, &more);
    }
    line
}
