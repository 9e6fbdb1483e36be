# guest: PV guests, several vhosts, a daemon that comes late and dies under load, a guest that is destroyed and made
# again.
. /library.sh
. /guests.sh

configure << END
backstores:
  first: { type: file, path: /dev/shm/disk0, size: 64MiB, buffered: true }
  second: { type: ram, size: 16MiB }
  third: { type: ram, size: 16MiB }
targets:
  $TARGET: { luns: { 0: first, 1: second } }
  naa.60014054ac780583: { luns: { 0: third } }
xen:
reactors: 2
END

need "a paused guest" create first /guest-first.sh
first=$(xl domid first)
need "two devices on one vhost, and a second with a whole target" targetctl xen attach --no-wait first \
    $TARGET:0,0:0:0:0 $TARGET:1,0:0:1:3 naa.60014054ac780583:0,1:0:0:0,feature-host
check "waiting in vain ends, and says why" sh -c '
    targetctl xen wait --timeout 1 first 2>&1 | grep -q "does targetd run there"'
xl unpause first
check "the front end waits for us" within 60 is "$(front "$first" 0)/state" 3
serve
need "the daemon that started after the guest serves it: all of its vhosts" targetctl xen wait first
need "the guest's load runs" within 120 said first "load runs"
for death in 1 2 3; do
    sleep 3
    kill -9 $server
    wait $server 2> /dev/null
    serve
done
need "the guest ends" within 180 stopped first
collect first
check "its nodes are gone" within 30 gone "$(back "$first" 0)"
check "those of its second vhost too" within 30 gone "/local/domain/0/backend/vscsi/$first"

need "the next guest" create second /guest-second.sh
second=$(xl domid second)
need "it gets the same disk" targetctl xen attach --no-wait second $TARGET:0,0:0:0:0
xl unpause second
need "its load runs" within 120 said second "load runs"
check "destroying it under load" xl destroy second
check "nothing of it is left" within 30 gone "/local/domain/0/backend/vscsi/$second"
log second | grep -E "^(not )?ok " | sed "s/^\(not ok\|ok\) /\1 second: /"
check "the daemon lives" kill -0 $server

need "a third guest" create third /guest-third.sh
third=$(xl domid third)
need "it gets the disk that the second had" targetctl xen attach --no-wait third $TARGET:0,0:0:0:0
xl unpause third
check "it comes up" targetctl xen wait third
check "a target of another reactor is refused, and why" sh -c '
    targetctl xen attach third naa.60014054ac780583:0,0:0:3:0 2>&1 | grep -q "another reactor.*vhost of its own"'
check "hot add to a guest" targetctl xen attach third $TARGET:1,0:0:2:0
need "the guest has seen the added disk" within 60 said third "a disk is added"
check "hot remove from a guest" targetctl xen detach third 0:0:2:0
need "the third guest ends" within 120 stopped third
collect third

need "a fourth guest" create fourth /guest-fourth.sh
need "it gets the disk too" targetctl xen attach --no-wait fourth $TARGET:0,0:0:0:0
xl unpause fourth
need "its load runs too" within 120 said fourth "load runs"
sleep 2
need "it is saved under load" xl save fourth /dev/shm/saved
check "nothing of it is left here" within 30 gone "/local/domain/0/backend/vscsi/$((third + 1))"
need "it is restored, as another domain" xl restore -p /tmp/fourth.cfg /dev/shm/saved
rm /dev/shm/saved
need "it gets its disk again" targetctl xen attach --no-wait fourth $TARGET:0,0:0:0:0
xl unpause fourth
check "its front end takes the new ring" targetctl xen wait fourth
need "the fourth guest ends" within 120 stopped fourth
collect fourth
kill -TERM $server
wait $server
result=$?
check "the daemon stops in good order" test $result = 0
[ $failures = 0 ] || report
finish
