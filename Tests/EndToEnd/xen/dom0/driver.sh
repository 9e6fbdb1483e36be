# driver: targetd in a driver domain: a PV guest whose disk another PV guest serves, and dom0 only writes the nodes.
. /library.sh
. /guests.sh

configure << END
backstores:
  first: { type: file, path: /dev/shm/disk0, size: 48MiB, buffered: true }
  second: { type: ram, size: 8MiB }
targets: { $TARGET: { luns: { 0: first, 1: second } } }
xen: { enabled: true }
END

# Before its script takes commands, the driver domain needs what dom0's own init does for dom0.
cat > /prepare << END
mkdir -p /dev/shm /run/targetd
cp /targetd.yaml /tmp/
mount -t tmpfs tmpfs /dev/shm
for module in $(grep -E "xen|privcmd" /modules | grep -v scsifront | tr '\n' ' '); do insmod \$module 2> /dev/null; done
mount -t xenfs xenfs /proc/xen
. /library.sh
END
touch /no-disk
cp /tmp/targetd.yaml /
memory=640
need "a driver domain" create driver /guest-commands.sh /prepare /no-disk /targetd.yaml /usr/bin/targetd \
    $(libraries /usr/bin/targetd) $(grep -E "xen|privcmd" /modules | grep -v scsifront)
xl unpause driver
driver=$(xl domid driver)
need "it takes commands" within 120 said driver "takes commands"
need "targetd starts in it" inside driver "serve; within 60 grep 'follows xenstore' /tmp/target.log"
check "dom0 serves nothing" gone /local/domain/0/backend/vscsi

memory=384
need "a guest" create guest /guest-driven.sh
guest=$(xl domid guest)
need "dom0's toolstack attaches a disk of the driver domain" targetctl xen attach --backend driver --no-wait guest \
    $TARGET:0,0:0:0:0
xl unpause guest
need "the driver domain serves it" targetctl xen wait --backend driver guest
nodes="/local/domain/$driver/backend/vscsi/$guest"
check "the front end's other end is the driver domain" is "$(front "$guest" 0)/backend-id" "$driver"
check "hot add" targetctl xen attach --backend driver guest $TARGET:1,0:0:1:0
check "an add that fails says why" sh -c '
    targetctl xen attach --backend driver guest '$TARGET':9,0:0:2:0 2>&1 | grep -q "refused: .*no logical unit 9"'
check "hot remove" targetctl xen detach --backend driver guest 0:0:1:0
need "the guest's load runs" within 120 said guest "load runs"
for death in 1 2; do
    sleep 3
    inside driver "killall -9 targetd; sleep 1; serve; true" > /dev/null
done
need "the guest ends" within 180 stopped guest
collect guest
check "its vhost is closed or gone" within 30 sh -c "
    ! xenstore-read $nodes/0/state > /dev/null 2>&1 || [ \"\$(xenstore-read $nodes/0/state)\" = 6 ]"

[ $failures = 0 ] || inside driver "tail -40 /tmp/target.log; dmesg | tail -20"
xl destroy driver
[ $failures = 0 ] || report
finish
