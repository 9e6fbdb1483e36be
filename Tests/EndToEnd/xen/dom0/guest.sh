# guest: PV guests, several vhosts, a daemon that comes late and dies under load, a guest that is destroyed and made
# again.
. /library.sh

DISKS="$TARGET:0=file:/dev/shm/disk0:64 $TARGET:1=ram:16 naa.60014054ac780583:0=ram:16"

# create NAME SCRIPT: a paused guest that will run the script
create() {
    rm -rf /tmp/overlay
    mkdir -p /tmp/overlay
    cp "$2" /tmp/overlay/script
    cp /library.sh /tmp/overlay/library.sh
    (cat /domu/initramfs; cd /tmp/overlay && find . | cpio -o -H newc 2> /dev/null) > "/tmp/$1.initramfs"
    cat > "/tmp/$1.cfg" << END
name = "$1"
type = "pv"
memory = 384
vcpus = 1
kernel = "/domu/kernel"
ramdisk = "/tmp/$1.initramfs"
extra = "console=hvc0 rdinit=/init mitigations=off clocksource=xen tsc=unstable"
on_poweroff = "destroy"
on_crash = "destroy"
on_reboot = "destroy"
END
    xl create -p -q "/tmp/$1.cfg" || return 1
    rm "/tmp/$1.initramfs"
}

log() { tr -d '\r' < "/var/log/xen/console/guest-$1.log"; }
said() { log "$1" | grep -q "$2"; }
stopped() { ! xl domid "$1" > /dev/null 2>&1; }

# collect NAME: the guest's own checks become ours
collect() {
    log "$1" | grep -A8 -E "^(not )?ok |^    |^@@status" | sed "s/^\(not ok\|ok\) /\1 $1: /; s/^@@.*//"
    said "$1" "^@@status 0" || failures=$((failures + 1))
}

xenconsoled --log=guest --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid

need "a paused guest" create first /guest-first.sh
first=$(xl domid first)
need "two devices on one vhost" attach "$first" 0 $TARGET:0=0:0:0:0 $TARGET:1=0:0:1:3
export FEATURE_HOST=1
need "a second vhost with a whole target" attach "$first" 1 naa.60014054ac780583:0=0:0:0:0
unset FEATURE_HOST
xl unpause first
check "the front end waits for us" within 60 is "$(front "$first" 0)/state" 3
# shellcheck disable=SC2086
serve $DISKS
need "the daemon that started after the guest serves it" within 60 is "$(front "$first" 0)/state" 4
check "both vhosts" within 30 is "$(back "$first" 1)/state" 4
need "the guest's load runs" within 120 said first "load runs"
for death in 1 2 3; do
    sleep 3
    kill -9 $server
    wait $server 2> /dev/null
    # shellcheck disable=SC2086
    serve $DISKS
done
need "the guest ends" within 180 stopped first
collect first
check "its nodes are gone" within 30 gone "$(back "$first" 0)"
check "those of its second vhost too" within 30 gone "/local/domain/0/backend/vscsi/$first"

need "the next guest" create second /guest-second.sh
second=$(xl domid second)
need "it gets the same disk" attach "$second" 0 $TARGET:0=0:0:0:0
xl unpause second
need "its load runs" within 120 said second "load runs"
check "destroying it under load" xl destroy second
check "nothing of it is left" within 30 gone "/local/domain/0/backend/vscsi/$second"
log second | grep -E "^(not )?ok " | sed "s/^\(not ok\|ok\) /\1 second: /"
check "the daemon lives" kill -0 $server

need "a third guest" create third /guest-third.sh
third=$(xl domid third)
need "it gets the disk that the second had" attach "$third" 0 $TARGET:0=0:0:0:0
xl unpause third
check "it comes up" within 60 is "$(front "$third" 0)/state" 4
check "hot add to a guest" add "$third" 0 1 $TARGET:1 0:0:2:0
check "it is connected" added "$third" 0 1 4
check "hot remove from a guest" remove "$third" 0 1
need "the third guest ends" within 120 stopped third
collect third
kill -TERM $server
wait $server
result=$?
check "the daemon stops in good order" test $result = 0
[ $failures = 0 ] || report
finish
