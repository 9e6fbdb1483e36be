# library: what the scripts of dom0 have in common: checks, waiting, the daemon.
#
# A check prints "ok <title>" or "not ok <title>" with what its command printed; `finish` ends with 1 if one failed.

TARGET=naa.60014054ac780582
failures=0

check() {
    title=$1
    shift
    if output=$("$@" 2>&1); then
        echo "ok $title"
    else
        failures=$((failures + 1))
        echo "not ok $title"
        echo "$output" | sed 's/^/    /'
    fi
}

# need TITLE COMMAND...: a check without which nothing that follows makes sense
need() {
    before=$failures
    check "$@"
    [ "$failures" = "$before" ] || { report; finish; }
}

# What helps to find out why something failed.
report() {
    echo "--- the back end's log"
    tail -60 /tmp/target.log
    dmesg | tail -30
    xenstore-ls -f /local/domain/0/backend
    xenstore-ls -f /local/domain/0/device
    for guest in /var/log/xen/console/guest-*; do
        [ ! -e "$guest" ] || { echo "--- $guest"; tail -15 "$guest"; }
    done
}

finish() {
    # A disk without a back end would hold up the power-off for ever.
    for vhost in 0 1; do
        gone "$(front 0 $vhost)/state" || echo "vscsi-$vhost" > /sys/bus/xen/drivers/vscsi/unbind 2> /dev/null &
    done
    sleep 2
    echo "$failures failures"
    [ "$failures" = 0 ]
    exit $?
}

# within SECONDS COMMAND...: until the command succeeds
within() {
    left=$(($1 * 10))
    shift
    until "$@" > /dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "did not happen: $*"; return 1; }
        usleep 100000
    done
}

is() { [ "$(xenstore-read "$1" 2> /dev/null)" = "$2" ]; }
gone() { ! xenstore-read "$1" > /dev/null 2>&1; }
# disk H:C:T:L: its device node
disk() { echo "/dev/$(ls "/sys/bus/scsi/devices/$1/block" 2> /dev/null)"; }
disks() { ls -d /sys/bus/scsi/devices/*:*:*:* 2> /dev/null | wc -l; }

back() { echo "/local/domain/0/backend/vscsi/$1/$2"; }
front() { echo "/local/domain/$1/device/vscsi/$2"; }

# state DOMAIN VHOST DEVICE: of the device's back end
state() { xenstore-read "$(back "$1" "$2")/vscsi-devs/$3/state"; }

# configure: makes the daemon's configuration from standard input
configure() {
    cat > /tmp/targetd.yaml
    echo "control: { socket: /run/targetd/control.sock }" >> /tmp/targetd.yaml
}

# serve: starts the daemon; its log is /tmp/target.log
serve() {
    targetd --config /tmp/targetd.yaml >> /tmp/target.log 2>&1 &
    server=$!
}
