# driven: uses a disk that another guest serves, and keeps writing while the daemon there dies.
. /library.sh

dd if=/dev/urandom of=/tmp/random bs=1M count=8 2> /dev/null
check "mkfs" mkfs.ext4 -q -b 4096 /dev/sda
check "mount, write, remount, compare" sh -c "mount -t ext4 /dev/sda /mnt && cp /tmp/random /mnt/file && umount /mnt &&
    echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/sda /mnt && cmp /mnt/file /tmp/random && umount /mnt"
check "sg_reset -d" sg_reset -N -d /dev/sda
# Until dom0 has tried to add and remove disks.
within 60 test -b /dev/sdb
within 60 test ! -b /dev/sdb
echo "load runs"
fio --name=load --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-256k \
    --offset=32M --size=16M --time_based --runtime=14 --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
    > /tmp/fio 2>&1
result=$?
check "no I/O error while the daemon died" test $result = 0
check "fio has verified what it wrote" sh -c 'grep -q "err= 0" /tmp/fio || { cat /tmp/fio; false; }'
check "the file system is intact" e2fsck -fn /dev/sda
check "the kernel has nothing to complain about" \
    sh -c '! dmesg | grep -iE "illegal rqid|disabling device|still in use by|I/O error|BUG:|WARNING:"'
[ $failures = 0 ]
