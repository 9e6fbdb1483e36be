# second: reads what the first has written, and is destroyed while it writes.
. /library.sh

check "what the first guest wrote is there" e2fsck -fn /dev/sda
echo "load runs"
fio --name=load --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=64k --offset=32M \
    --size=32M --time_based --runtime=600
