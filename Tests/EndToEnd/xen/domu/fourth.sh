# fourth: is saved to a file and restored while it writes and verifies.
. /library.sh

echo "load runs"
fio --name=load --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-256k \
    --offset=32M --size=32M --time_based --runtime=20 --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
    > /tmp/fio 2>&1
result=$?
check "no I/O error while it was saved and restored" test $result = 0
check "fio has verified what it wrote" sh -c 'grep -q "err= 0" /tmp/fio || { cat /tmp/fio; false; }'
check "it has been suspended" sh -c 'dmesg | grep -q "suspending xenstore"'
check "the kernel has nothing to complain about" \
    sh -c '! dmesg | grep -iE "illegal rqid|disabling device|still in use by|I/O error|BUG:|WARNING:"'
[ $failures = 0 ]
