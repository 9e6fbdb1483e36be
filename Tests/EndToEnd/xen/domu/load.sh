# load: measures two disks in turns: each row on the one that targetd serves, and at once on the kernel's.
. /library.sh

# row SERVER OPERATION BYTES DEPTH: prints when it begins, and what it has moved in how many milliseconds when it ends
row() {
    disk=$(disk "$([ "$1" = targetd ] && echo 1 || echo 0):0:0:0")
    echo "@begin $1 $2 $3"
    # Dom0 notices in this time.
    sleep 3
    fio --minimal --name=row "--filename=$disk" --direct=1 --ioengine=libaio --iodepth="$4" "--rw=rand$2" "--bs=$3" \
        --size=60M --time_based --runtime="$SECONDS_PER_ROW" > /tmp/fio
    awk -F';' -v row="$1 $2 $3" '{ print "@end", row, $6 + $47, $9 + $50 }' /tmp/fio
}

within 60 test -b "$(disk 1:0:0:0)"
# Memory that nobody has touched yet would be measured with the first rows.
for host in 0 1; do
    fio --minimal --name=fill "--filename=$(disk $host:0:0:0)" --direct=1 --rw=write --bs=256k --size=60M > /dev/null
done
for round in $(seq "$ROUNDS"); do
    # What dom0 uses while nobody does anything.
    echo "@begin nobody idle 0k"
    sleep 3
    sleep "$SECONDS_PER_ROW"
    echo "@end nobody idle 0k 0 $((SECONDS_PER_ROW * 1000))"
    for bytes in 4k 256k; do
        for operation in read write; do
            # Who comes first may find the machine in another state than who comes second.
            servers=$([ $((round % 2)) = 0 ] && echo targetd lio || echo lio targetd)
            for server in $servers; do row "$server" $operation $bytes $([ $bytes = 4k ] && echo 32 || echo 8); done
        done
    done
done
sleep 1000
