# benchmark: a guest's disk in memory, served by targetd and by the kernel's own xen-scsiback with LIO, in turns.
#
# Prints a line for each row of each turn: server, operation, bytes, KiB, milliseconds, seconds of dom0's processor.
. /library.sh

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
log() { tr -d '\r' < /var/log/xen/console/guest-load.log; }
lines() { log | grep -c "^@$1"; }
more() { [ "$(lines "$1")" -gt "$2" ]; }

# measure SERVER: one turn
measure() {
    for row in 1 2 3 4; do
        more begin $begun || within 60 more begin $begun
        begun=$((begun + 1))
        before=$(processor)
        # Looking for the end takes more of the processor than serving the disk: not before it can be there.
        sleep $((SECONDS_PER_ROW + 4))
        until more end $ended; do sleep 1; done
        ended=$((ended + 1))
        after=$(processor)
        echo "@@row $1 $(log | grep "^@end" | tail -1 | cut -d" " -f2-) $(echo "$after $before" | awk '{ print $1 - $2 }')"
    done
}

mkdir -p /tmp/overlay
cp /guest-load.sh /tmp/overlay/script
cp /library.sh /tmp/overlay/library.sh
(cat /domu/initramfs; cd /tmp/overlay && find . | cpio -o -H newc 2> /dev/null) > /tmp/load.initramfs
cat > /tmp/load.cfg << END
name = "load"
type = "pv"
memory = 384
vcpus = 1
kernel = "/domu/kernel"
ramdisk = "/tmp/load.initramfs"
extra = "console=hvc0 rdinit=/init mitigations=off clocksource=xen tsc=unstable"
END
xenconsoled --log=guest --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid
lio
echo 0 > /sys/bus/xen-backend/drivers_autoprobe
need "a guest" xl create -q /tmp/load.cfg
begun=0 ended=0
for turn in $(seq "$TURNS"); do
    serve
    need "targetd's disk" targetctl xen attach load $TARGET:0,0:0:0:0 --timeout 120
    measure targetd
    need "it is taken away" targetctl xen detach load 0:0:0:0
    kill -TERM $server
    wait $server
    echo 1 > /sys/bus/xen-backend/drivers_autoprobe
    need "LIO's disk" targetctl xen attach load naa.6001405000000001:0,0:0:0:0 --timeout 120
    measure lio
    need "it is taken away too" targetctl xen detach load 0:0:0:0
    echo 0 > /sys/bus/xen-backend/drivers_autoprobe
done
xl destroy load
[ $failures = 0 ] || report
echo "$failures failures"
[ $failures = 0 ]
