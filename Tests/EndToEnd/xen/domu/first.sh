# first: uses the disks of two vhosts, and keeps writing while the daemon dies.
. /library.sh

check "the disks of both vhosts" within 30 test -b /dev/sdc
check "the second device is 0:0:1:3" test -b "$(disk 0:0:1:3)"
check "the second vhost has a disk" test -b "$(disk 1:0:0:0)"
disk=$(disk 0:0:0:0)
check "REPORT LUNS of a mapped target" sh -c "sg_luns $(disk 0:0:1:3) | grep -q 'Lun list length = 8 '"
dd if=/dev/urandom of=/tmp/random bs=1M count=8 2> /dev/null
check "mkfs" mkfs.ext4 -q -b 4096 "$disk"
check "mount, write, remount, compare" sh -c "mount -t ext4 $disk /mnt && cp /tmp/random /mnt/file && umount /mnt &&
    echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 $disk /mnt && cmp /mnt/file /tmp/random && umount /mnt"
check "sg_reset -d" sg_reset -N -d "$disk"
echo "load runs"
fio --name=load "--filename=$disk" --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-256k \
    --offset=32M --size=32M --time_based --runtime=14 --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
    > /tmp/fio 2>&1
result=$?
check "no I/O error while the daemon died" test $result = 0
check "fio has verified what it wrote" sh -c 'grep -q "err= 0" /tmp/fio || { cat /tmp/fio; false; }'
check "the file system is intact" e2fsck -fn "$disk"
check "the kernel has nothing to complain about" \
    sh -c '! dmesg | grep -iE "illegal rqid|disabling device|still in use by|I/O error|BUG:|WARNING:"'
[ $failures = 0 ]
