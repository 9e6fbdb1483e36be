# loopback: front and back end both in dom0, all that needs no guest.
. /library.sh

server=$(cat /run/server)
need "a daemon that started before xenstored serves" within 30 grep -q "follows xenstore" /tmp/target.log
check "it had said what it was waiting for" grep -q "waits, and tries again each second" /tmp/target.log
need "targetctl attaches a disk, and waits for it" targetctl xen attach 0 $TARGET:0,0:0:0:0
need "the guest finds the disk" within 20 test -b /dev/sda
within 20 test -c /dev/sg0
check "INQUIRY names us" sh -c 'sg_inq /dev/sg0 | grep -q "TARGETD"'
check "device identification is the target's" sg_vpd --page=di /dev/sg0
check "READ CAPACITY" sh -c 'sg_readcap /dev/sda | grep -q "Number of logical blocks=196608"'
check "REPORT LUNS shows exactly the map" sh -c 'sg_luns /dev/sg0 | grep -q "Lun list length = 8 "'
check "large requests: 508 KiB" sh -c '[ "$(cat /sys/block/sda/queue/max_sectors_kb)" = 508 ]'
dd if=/dev/urandom of=/tmp/random bs=1M count=24 2> /dev/null
check "write with indirect segments" dd if=/tmp/random of=/dev/sda bs=1M oflag=direct
need "read back what was written" sh -c 'dd if=/dev/sda bs=1M count=24 iflag=direct 2> /dev/null | cmp - /tmp/random'
check "odd sizes through sg" sh -c '
    sg_dd if=/dev/sg0 of=/tmp/part bs=512 skip=3 count=77 bpt=7 && cmp -n 39424 /tmp/part /dev/sda 0 1536'
# Blocks of a page: with smaller ones, large writes are cut off the page boundary, and then Linux's front end fails them
# itself ("Unable to map request_buffer").
check "mkfs" mkfs.ext4 -q -b 4096 /dev/sda
check "mount, write, remount, compare" sh -c 'mount -t ext4 /dev/sda /mnt && cp /tmp/random /mnt/file && umount /mnt &&
    echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/sda /mnt && cmp /mnt/file /tmp/random && umount /mnt &&
    e2fsck -fn /dev/sda'
check "fio verifies" fio --name=v --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite \
    --bsrange=512-300k --blockalign=512 --size=24M --verify=crc32c --do_verify=1 --verify_fatal=1
check "sg_reset -d" sg_reset -N -d /dev/sg0
check "the disk goes on after the reset" sh -c 'sg_turs /dev/sg0; sg_turs /dev/sg0'

check "hot add, by the number of a domain's name" targetctl xen attach Domain-0 $TARGET:1,0:0:1:0
need "the guest finds the added disk" within 20 test -b /dev/sdb
check "the added disk works" dd if=/tmp/random of=/dev/sdb bs=64k count=100 oflag=direct
check "an add that fails says why" sh -c '. /library.sh
    targetctl xen attach 0 naa.60014054ac780582:9,0:0:2:0 2>&1 | grep -q "refused: .*no logical unit 9"'
check "a v-dev that is in use is not given twice" sh -c '
    targetctl xen attach 0 '$TARGET':1,0:0:0:0; [ $? = 65 ]'
check "targetctl lists the devices" sh -c '
    targetctl xen list 0 | grep -q "0:0:1:0 *'$TARGET':1 *connected" && targetctl xen list | grep -q "no logical unit 9"'
check "the daemon's own list has them too" sh -c '
    targetctl list xen | grep -q "connected.*0:0:1:0='$TARGET':1" && targetctl status | grep -q "0:0:0:0="'
check "hot remove, by the p-dev" targetctl xen detach 0 $TARGET:1
check "the removed disk is gone" within 20 test ! -e /dev/sdb
check "so are its nodes" gone "$(back 0 0)/vscsi-devs/dev-1/state"

sed "s/^vhost-user-scsi:/  naa.60014054ac780584: { luns: { 0: late } }\nvhost-user-scsi:/; s/^targets:/  late: { type: ram, size: 8MiB }\ntargets:/" \
    /tmp/targetd.yaml > /tmp/more.yaml
check "apply adds a target while guests are served" targetctl apply /tmp/more.yaml
check "a guest gets a disk of it" targetctl xen attach 0 naa.60014054ac780584:0,0:0:5:0
need "the guest finds it" within 20 test -b /dev/sdb
check "apply takes the target away again" targetctl apply /tmp/targetd.yaml
check "its disk answers no more" sh -c 'sg_turs /dev/sdb 2>&1 | grep -q DID_BAD_TARGET'
check "apply brings it back" targetctl apply /tmp/more.yaml
check "the disk answers again" within 20 sg_turs /dev/sdb
check "it is detached" targetctl xen detach 0 0:0:5:0
cp /tmp/more.yaml /tmp/targetd.yaml

check "a second vhost with a whole target" targetctl xen attach 0 $TARGET:0,1:0:0:0,feature-host
within 20 test -b /dev/sdb
check "all units of the target are reported" sh -c 'sg_luns /dev/sdb | grep -q "Lun list length = 16 "'
sg_turs /dev/sda
sg_turs /dev/sdb
check "a reset by one initiator is a unit attention for the other" sh -c '
    sg_reset -N -d /dev/sdb && sg_requests /dev/sda 2>&1 | grep -qi "reset"'
check "the second vhost is another initiator of the same disk" sh -c '
    sg_persist --out --register --param-sark=0x1 /dev/sda && sg_persist --out --reserve --param-rk=0x1 \
        --prout-type=3 /dev/sda
    sg_turs /dev/sdb
    sg_raw -s 512 -i /tmp/random /dev/sdb 2a 00 00 00 00 00 00 00 01 00 2>&1 | grep -qi "reservation conflict"
    status=$?
    sg_persist --out --clear --param-rk=0x1 /dev/sda && [ $status = 0 ]'
check "close by the back end's side" targetctl xen detach 0 --vhost 1
check "no disk is left of it" within 20 test ! -e /dev/sdb

while read -r module; do
    case $module in *scsi_debug*) insmod "$module" max_luns=2 ;; *) insmod "$module" ;; esac
done < /modules.host-device
within 20 sh -c '[ "$(lsscsi | grep -c scsi_debug)" = 2 ]'
# generic ADDRESS: its sg node
generic() { echo "/dev/$(ls "/sys/bus/scsi/devices/$1/scsi_generic")"; }
own=$(lsscsi | sed -n 's/^\[\([0-9:]*:0\)\].*scsi_debug.*/\1/p')
# The number that Linux gives to vhost 2 as a SCSI host.
host() { ls "/sys/bus/xen/devices/vscsi-2" | sed -n 's/^host//p'; }
need "a SCSI device of this host is attached" targetctl xen attach 0 "$(disk "$own"),2:0:0:0"
need "the guest finds it" within 20 sh -c '[ "$(lsscsi | grep -c scsi_debug)" = 3 ]'
given=$(host):0:0:0
check "p-dev is its address, p-devname what was said" sh -c '
    [ "$(xenstore-read '"$(back 0 2)"'/vscsi-devs/dev-0/p-dev)" = '"$own"' ] &&
    [ "$(xenstore-read '"$(back 0 2)"'/vscsi-devs/dev-0/p-devname)" = '"$(disk "$own")"' ]'
check "REPORT LUNS of it shows exactly the map" sh -c 'sg_luns '"$(generic "$given")"' | grep -q "Lun list length = 8 "'
check "what the guest writes is on the device" sh -c '
    dd if=/tmp/random of='"$(disk "$given")"' bs=256k count=20 oflag=direct 2>&1 &&
    dd if='"$(disk "$own")"' bs=1M count=5 iflag=direct 2> /dev/null | cmp -n 5242880 - /tmp/random'
check "and fio verifies it" fio --name=v "--filename=$(disk "$given")" --direct=1 --ioengine=libaio --iodepth=32 \
    --rw=randwrite --bsrange=512-300k --blockalign=512 --size=7M --verify=crc32c --do_verify=1 --verify_fatal=1
check "sense data is the device's" sh -c '
    sg_raw -r 512 '"$(generic "$given")"' 28 00 ff ff ff fe 00 00 01 00 2>&1 | grep -q "Logical block address out of range"'
check "microcode is not downloaded through it, though the device would" sh -c '
    sg_raw -s 512 -i /tmp/random '"$(generic "$own")"' 3b 05 00 00 00 00 00 02 00 00 > /dev/null 2>&1 || exit 1
    sg_raw -s 512 -i /tmp/random '"$(generic "$given")"' 3b 05 00 00 00 00 00 02 00 00 2>&1 |
        grep -q "Invalid command operation code"'
# What its driver is asked to do is in the kernel's log while this is 1.
echo 1 > /sys/bus/pseudo/drivers/scsi_debug/opts
check "sg_reset -d is answered" sg_reset -N -d "$(generic "$given")"
check "and has reset the device" sh -c 'dmesg | grep -q "scsi_debug_device_reset"'
echo 0 > /sys/bus/pseudo/drivers/scsi_debug/opts
sg_turs "$(generic "$given")" > /dev/null 2>&1
echo 4 > /sys/bus/pseudo/drivers/scsi_debug/opts
echo -1 > /sys/bus/pseudo/drivers/scsi_debug/every_nth
check "a command that never ends is ended by its time-out" sh -c '
    ! timeout 100 sg_raw -t 3 -r 512 '"$(generic "$given")"' 28 00 00 00 00 00 00 00 01 00'
echo 0 > /sys/bus/pseudo/drivers/scsi_debug/opts
echo 0 > /sys/bus/pseudo/drivers/scsi_debug/every_nth
check "and the device goes on" within 30 sg_turs "$(generic "$given")"
check "it is detached" targetctl xen detach 0 "$own"
check "a whole target of this host is attached" targetctl xen attach 0 "$own,2:0:0:0,feature-host"
within 20 test -e "/sys/bus/scsi/devices/$(host):0:0:0/scsi_generic"
check "its units are two in REPORT LUNS" sh -c 'sg_luns '"$(generic "$(host):0:0:0")"' | grep -q "Lun list length = 16 "'
echo "0 0 1" > "/sys/class/scsi_host/host$(host)/scan"
check "the guest finds the second, for which xenstore has no device" within 20 test -b "$(disk "$(host):0:0:1")"
check "they are detached together" targetctl xen detach 0 --vhost 2
check "a SCSI device that is not there is refused" sh -c '
    targetctl xen attach 0 9:9:9:9,2:0:0:0 2>&1 | grep -q "this host has no SCSI device 9:9:9:9"'
targetctl xen detach 0 --vhost 2 --timeout 5

# Family.Test of each that failed: the verdict ends a line, maybe after remarks.
failures() {
    awk '/^Suite: / { suite = $2 } /^ *Test: / { test = $2 } /FAILED$/ { print suite "." test }' /tmp/suite | sort -u
}
timeout 200 iscsi-test-cu --dataloss --test=ALL /dev/sg0 > /tmp/suite 2>&1
check "libiscsi's suite runs to its end" grep -q "^Run Summary" /tmp/suite
failures > /tmp/failed
check "libiscsi's suite: no failure but what a clause of the standard justifies" sh -c '
    grep -v -x -F -f /excepted /tmp/failed > /tmp/unexpected; cat /tmp/unexpected; ! test -s /tmp/unexpected'
grep -E "^ +(tests|asserts) " /tmp/suite

dd if=/tmp/random of=/dev/sda bs=1M count=24 oflag=direct conv=fsync 2> /dev/null
fio --name=load --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-256k \
    --offset=32M --size=32M --time_based --runtime=12 --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
    > /tmp/fio 2>&1 &
load=$!
for death in 1 2 3; do
    sleep 2
    kill -9 $server
    wait $server 2> /dev/null
    serve
done
wait $load
result=$?
check "three daemons killed under load: no I/O error" test $result = 0
check "fio has verified what it wrote" sh -c 'grep -q "err= 0" /tmp/fio || { cat /tmp/fio; false; }'
check "what was written before is intact" sh -c '
    dd if=/dev/sda bs=1M count=24 iflag=direct 2> /dev/null | cmp - /tmp/random'
kill -TERM $server
wait $server
result=$?
check "a daemon stops in good order" test $result = 0
serve
check "its successor serves the same ring" dd if=/dev/sda of=/dev/null bs=64k count=100 iflag=direct

echo vscsi-0 > /sys/bus/xen/drivers/vscsi/unbind
check "the front end's driver goes away" within 20 is "$(back 0 0)/state" 6
check "the kernel has nothing to complain about" sh -c '
    ! dmesg | grep -iE "illegal rqid|disabling device|still in use by|I/O error|(^|[^a-z])BUG:|WARNING:"'
[ $failures = 0 ] || report
finish
