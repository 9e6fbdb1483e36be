# guests: what the scripts of dom0 that have PV guests have in common: making them, their consoles.

xenconsoled --log=guest --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid

# create NAME SCRIPT [FILE...]: a paused guest that will run the script, with files of dom0 at the same places
create() {
    rm -rf /tmp/overlay
    mkdir -p /tmp/overlay
    cp "$2" /tmp/overlay/script
    cp /library.sh /tmp/overlay/library.sh
    name=$1
    shift 2
    for file in "$@"; do
        mkdir -p "/tmp/overlay/$(dirname "$file")"
        cp -L "$file" "/tmp/overlay/$file"
    done
    (cat /domu/initramfs; cd /tmp/overlay && find . | cpio -o -H newc 2> /dev/null) > "/tmp/$name.initramfs"
    cat > "/tmp/$name.cfg" << END
name = "$name"
type = "pv"
memory = ${memory:-384}
vcpus = 1
kernel = "/domu/kernel"
ramdisk = "/tmp/$name.initramfs"
extra = "console=hvc0 rdinit=/init mitigations=off clocksource=xen tsc=unstable"
on_poweroff = "destroy"
on_crash = "destroy"
on_reboot = "destroy"
END
    xl create -p -q "/tmp/$name.cfg" || return 1
    rm "/tmp/$name.initramfs"
}

# libraries PROGRAM: the shared libraries that it needs
libraries() { sed -n "s|^$1: ||p" /libraries; }

# tell NAME LINE: for a guest whose script is commands.sh
tell() {
    terminal=$(xenstore-read "/local/domain/$(xl domid "$1")/console/tty")
    (echo "$2" | tr '\n' ' '; echo) > "$terminal"
}

# inside NAME COMMAND...: what the command prints and returns in such a guest
inside() {
    name=$1
    shift
    mark=$(cat /proc/sys/kernel/random/uuid)
    tell "$name" "echo @@begin $mark; ( $* ) 2>&1; echo @@answer $mark \$?"
    within "${patience:-120}" said "$name" "^@@answer $mark" || return 1
    log "$name" | sed -n "/^@@begin $mark/,/^@@answer $mark/p" | grep -v "^@@"
    return "$(log "$name" | sed -n "s/^@@answer $mark //p")"
}

log() { tr -d '\r' < "/var/log/xen/console/guest-$1.log"; }
said() { log "$1" | grep -q "$2"; }
stopped() { ! xl domid "$1" > /dev/null 2>&1; }

# collect NAME: the guest's own checks become ours
collect() {
    log "$1" | grep -A8 -E "^(not )?ok |^    |^@@status" | sed "s/^\(not ok\|ok\) /\1 $1: /; s/^@@.*//"
    said "$1" "^@@status 0" || failures=$((failures + 1))
}
