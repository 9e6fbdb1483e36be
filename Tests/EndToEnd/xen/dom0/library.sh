# library: what the scripts of dom0 have in common: checks, the toolstack's side of vscsi, waiting.
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
    cat /tmp/target.log
    dmesg | tail -30
    xenstore-ls -f /local/domain/0/backend
    xenstore-ls -f /local/domain/0/device
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

# attach DOMAIN VHOST P-DEV=V-DEV...: one transaction, then the permissions
attach() {
    domain=$1 vhost=$2
    B=$(back "$domain" "$vhost") F=$(front "$domain" "$vhost")
    shift 2
    number=0
    nodes=""
    for device; do
        D=$B/vscsi-devs/dev-$number
        nodes="$nodes $D/p-dev ${device%%=*} $D/v-dev ${device##*=} $D/state 1"
        number=$((number + 1))
    done
    # shellcheck disable=SC2086
    xenstore-write "$B/frontend" "$F" "$B/frontend-id" "$domain" "$B/online" 1 "$B/feature-host" "${FEATURE_HOST:-0}" \
        $nodes "$B/state" 1 "$F/backend" "$B" "$F/backend-id" 0 "$F/state" 1 || return 1
    [ "$domain" = 0 ] && return
    xenstore-chmod -r "$B" n0 "r$domain" && xenstore-chmod -r "$F" "n$domain" r0
}

# add DOMAIN VHOST NUMBER P-DEV V-DEV
add() {
    B=$(back "$1" "$2")
    D=$B/vscsi-devs/dev-$3
    xenstore-write "$D/p-dev" "$4" "$D/v-dev" "$5" "$D/state" 1 "$B/state" 7
}

# added DOMAIN VHOST NUMBER STATE: waits
added() {
    B=$(back "$1" "$2")
    within 30 is "$B/vscsi-devs/dev-$3/state" "$4" && within 30 is "$B/state" 4
}

# remove DOMAIN VHOST NUMBER
remove() {
    B=$(back "$1" "$2")
    xenstore-write "$B/vscsi-devs/dev-$3/state" 5 "$B/state" 7
    within 30 is "$B/vscsi-devs/dev-$3/state" 6 && within 30 is "$B/state" 4 &&
        xenstore-rm "$B/vscsi-devs/dev-$3" && xenstore-rm "$(front "$1" "$2")/vscsi-devs/dev-$3"
}

# detach DOMAIN VHOST
detach() {
    B=$(back "$1" "$2")
    xenstore-write "$B/online" 0 "$B/state" 5
    within 30 is "$B/state" 6 && xenstore-rm "$B" && xenstore-rm "$(front "$1" "$2")"
}

# serve DISK...: starts the back end; its log is /tmp/target.log
serve() {
    xen-target "$@" >> /tmp/target.log 2>&1 &
    server=$!
}
