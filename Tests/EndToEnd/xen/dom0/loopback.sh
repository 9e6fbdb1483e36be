# loopback: front and back end both in dom0, all that needs no guest.
. /library.sh

serve $TARGET:0=file:/dev/shm/disk0:96 $TARGET:1=ram:32
need "a vhost comes up" attach 0 0 $TARGET:0=0:0:0:0
need "its device is connected" added 0 0 0 4
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

check "hot add" add 0 0 1 $TARGET:1 0:0:1:0
check "the added device is connected" added 0 0 1 4
need "the guest finds the added disk" within 20 test -b /dev/sdb
check "the added disk works" dd if=/tmp/random of=/dev/sdb bs=64k count=100 oflag=direct
check "a failed add" add 0 0 2 naa.60014054ac780582:9 0:0:2:0
check "the device that failed is 6 and says why" sh -c '. /library.sh; added 0 0 2 6 &&
    xenstore-read '"$(back 0 0)"'/vscsi-devs/dev-2/error | grep -q "no logical unit 9"'
xenstore-rm "$(back 0 0)/vscsi-devs/dev-2"
check "hot remove" remove 0 0 1
check "the removed disk is gone" within 20 test ! -e /dev/sdb

check "a second vhost with a whole target" env FEATURE_HOST=1 sh -c '. /library.sh; attach 0 1 '$TARGET':0=0:0:0:0'
need "it is connected" added 0 1 0 4
within 20 test -b /dev/sdb
check "all units of the target are reported" sh -c 'sg_luns /dev/sdb | grep -q "Lun list length = 16 "'
sg_turs /dev/sda
sg_turs /dev/sdb
check "a reset by one initiator is a unit attention for the other" sh -c '
    sg_reset -N -d /dev/sdb && sg_requests /dev/sda 2>&1 | grep -qi "reset"'
if sg_opcodes --opcode=0x5f,0 /dev/sda 2>&1 | grep -qi "not supported"; then
    echo "SKIPPED: persistent reservations between two initiators: the core does not have them"
else
    check "the second vhost is another initiator of the same disk" sh -c '
        sg_persist --out --register --param-sark=0x1 /dev/sda && sg_persist --out --reserve --param-rk=0x1 \
            --prout-type=3 /dev/sda
        sg_turs /dev/sdb
        sg_raw -s 512 -i /tmp/random /dev/sdb 2a 00 00 00 00 00 00 00 01 00 2>&1 | grep -qi "reservation conflict"'
fi
check "close by the back end's side" detach 0 1
check "no disk is left of it" within 20 test ! -e /dev/sdb

check "libiscsi's suite: no failure" sh -c '
    timeout 200 iscsi-test-cu --dataloss --test=ALL /dev/sg0 > /tmp/suite 2>&1 || { grep -A5 FAILED /tmp/suite; false; }'
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
    serve $TARGET:0=file:/dev/shm/disk0:96 $TARGET:1=ram:32
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
serve $TARGET:0=file:/dev/shm/disk0:96 $TARGET:1=ram:32
check "its successor serves the same ring" dd if=/dev/sda of=/dev/null bs=64k count=100 iflag=direct

echo vscsi-0 > /sys/bus/xen/drivers/vscsi/unbind
check "the front end's driver goes away" within 20 is "$(back 0 0)/state" 6
check "the kernel has nothing to complain about" sh -c '
    ! dmesg | grep -iE "illegal rqid|disabling device|still in use by|I/O error|BUG:|WARNING:"'
[ $failures = 0 ] || report
finish
