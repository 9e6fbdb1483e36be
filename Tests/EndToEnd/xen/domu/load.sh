# load: measures /dev/sda whenever there is one, until the machine ends.
. /library.sh

# row OPERATION BYTES DEPTH: prints when it begins, and what it has moved in how many milliseconds when it ends
row() {
    echo "@begin $1 $2"
    # Dom0 notices in this time.
    sleep 2
    fio --minimal --name=row --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth="$3" "--rw=rand$1" "--bs=$2" \
        --size=60M --time_based --runtime="$SECONDS_PER_ROW" > /tmp/fio
    awk -F';' -v row="$1 $2" '{ print "@end", row, $6 + $47, $9 + $50 }' /tmp/fio
}

while :; do
    until [ -b /dev/sda ]; do usleep 100000; done
    # Memory that nobody has touched yet would be measured with the first rows.
    fio --minimal --name=fill --filename=/dev/sda --direct=1 --rw=write --bs=256k --size=60M > /dev/null
    for bytes in 4k 256k; do
        for operation in read write; do row $operation $bytes $([ $bytes = 4k ] && echo 32 || echo 8); done
    done
    echo "@round"
    while [ -b /dev/sda ]; do usleep 100000; done
done
