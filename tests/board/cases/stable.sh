# What a guest flushed is on stable storage; a write or a flush that fails reaches it as an error.
make_disk /tmp/disk.img 32
cp /tmp/disk.img /tmp/before.img
truncate -s 64M /tmp/log.img
losetup /dev/loop0 /tmp/disk.img
losetup /dev/loop1 /tmp/log.img
sectors=$((32 * 2048))
dm() { dmsetup --noudevsync "$@"; }
table() { dm suspend disk && dm reload disk --table "0 $sectors $*" && dm resume disk; }
# The guest's last sector says which step is its next.
ask() { printf '%-512s' "$1" | dd of=/dev/loop0 bs=512 seek=$((sectors - 1)) oflag=direct 2>/dev/null; }
dm create disk --table "0 $sectors log-writes /dev/loop0 /dev/loop1"
start_daemon
guest g stable "disk = [ $(disk /dev/dm-0) ]"
create g
ask one.
[ "$(said g 'guest: one')" = "guest: one.: write works, flush works" ] || fail "$(said g 'guest: one')"
dm message disk 0 mark acknowledged
table linear /dev/loop0 0
# A power failure right after the flush was acknowledged: what the log has up to its last flush is what is left.
cat >/tmp/replay.py <<'PYTHON'
import struct
SECTOR, FLUSH, DISCARD, MARK = 512, 1, 4, 8
log, image = open("/tmp/log.img", "rb"), open("/tmp/before.img", "r+b")
magic, version, count, size = struct.unpack("<QQQI", log.read(28))
assert magic == 0x6A736677736872 and size == SECTOR, (hex(magic), size)
position, entries = SECTOR, []
for _ in range(count):
    log.seek(position)
    sector, sectors, flags, length = struct.unpack("<QQQQ", log.read(32))
    entries.append((sector, sectors, flags, position + SECTOR))
    position += SECTOR
    if flags & MARK and log.read(length).startswith(b"acknowledged"):
        break
    if not flags & (DISCARD | MARK):
        position += sectors * SECTOR
last = max(index for index, entry in enumerate(entries) if entry[2] & FLUSH)
for sector, sectors, flags, data in entries[: last + 1]:
    if sectors and not flags & (DISCARD | MARK):
        log.seek(data)
        image.seek(sector * SECTOR)
        image.write(log.read(sectors * SECTOR))
print(f"{len(entries)} entries in the log, the last flush is number {last + 1}")
PYTHON
note "$(python3 /tmp/replay.py)"
written() { tail -c +$((1048576 + 1)) "$1" | head -c 4; }
[ "$(written /tmp/before.img)" = one. ] || fail "a flush was acknowledged, and the data is not on stable storage"
table flakey /dev/loop0 0 0 600 1 error_writes
ask two.
note "$(said g 'guest: two')"
[ "$(said g 'guest: two')" = "guest: two.: write fails, flush fails" ] || fail "an error did not reach the guest"
table linear /dev/loop0 0
# What the failed flush lost is gone for good, whichever worker is asked.
ask thre
note "$(said g 'guest: thre')"
[ "$(said g 'guest: thre')" = "guest: thre: write works, flush fails" ] || fail "a flush works after a failed one"
kill -KILL "$(pids_of "$(domid g)")"
ask four
[ "$(said g 'guest: four')" = "guest: four: write works, flush fails" ] || fail "the next worker does not know: $(said g 'guest: four')"
xen-virtioctl list | grep -q 'a flush has failed' || fail "list does not say that a flush has failed"
# A new driver answers for its own writes; whoever looks still finds the reason.
ask five
note "$(said g 'guest: five')"
[ "$(said g 'guest: five')" = "guest: five: write works, flush works" ] || fail "after a reset: $(said g 'guest: five')"
xen-virtioctl list | grep 'a flush has failed' || fail "list has forgotten that a flush failed"
said g 'guest: done' >/dev/null
[ "$(written /tmp/disk.img)" = five ] || fail "the last write is not there"
destroy g
