# benchmark: two disks of a guest in memory, one served by targetd, one by the kernel's own xen-scsiback with LIO.
#
# Prints a line for each row of each round: server, operation, bytes, KiB, milliseconds, seconds of dom0's processor.
. /library.sh
. /guests.sh

configure << END
backstores: { disk: { type: ram, size: 64MiB } }
targets: { $TARGET: { luns: { 0: disk } } }
xen: { enabled: true }
END

lio() {
    # Devices are the kernel's own while this is 1.
    while read -r module; do insmod "$module"; done < /modules.scsiback 2> /dev/null
    mount -t configfs configfs /sys/kernel/config 2> /dev/null
    core=/sys/kernel/config/target/core/rd_mcp_0/ram
    tpg=/sys/kernel/config/target/xen-pvscsi/naa.6001405000000001/tpgt_1
    mkdir -p $core
    echo -n rd_pages=16384 > $core/control
    echo 1 > $core/enable
    mkdir -p $tpg/lun/lun_0
    echo -n naa.6001405000000002 > $tpg/nexus
    ln -s $core $tpg/lun/lun_0/disk
}

# processor: seconds that dom0 has used
processor() { xl list 0 | awk 'NR == 2 { print $NF }'; }
lines() { log load | grep -c "^@$1"; }
more() { [ "$(lines "$1")" -gt "$2" ]; }

# measure: one row, of whichever server the guest has chosen
measure() {
    more begin $measured || within 60 more begin $measured
    before=$(processor)
    # Looking for the end takes more of the processor than serving the disk: not before it can be there.
    sleep $((SECONDS_PER_ROW + 4))
    until more end $measured; do sleep 1; done
    measured=$((measured + 1))
    after=$(processor)
    moved=$(log load | grep "^@end" | sed -n "${measured}p" | cut -d" " -f2-)
    echo "@@row $moved $(echo "$after $before" | awk '{ print $1 - $2 }')"
}

lio
need "a guest" create load /guest-load.sh
xl unpause load
# The kernel's back end binds every vhost that there is while this is 1, and targetd leaves alone what is bound.
echo 1 > /sys/bus/xen-backend/drivers_autoprobe
need "LIO's disk" targetctl xen attach load naa.6001405000000001:0,0:0:0:0 --timeout 120
echo 0 > /sys/bus/xen-backend/drivers_autoprobe
serve
need "targetd's disk" targetctl xen attach load $TARGET:0,1:0:0:0 --timeout 120
check "LIO's is left alone" grep -q "served by the kernel's driver" /tmp/target.log
measured=0
for row in $(seq $((ROUNDS * 9))); do measure; done
xl destroy load
[ $failures = 0 ] || report
echo "$failures failures"
[ $failures = 0 ]
