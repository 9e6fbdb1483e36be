# both: one disk for a guest of Xen and for a front-end of vhost-user, served by one daemon at once.
. /library.sh
. /guests.sh

configure << END
backstores: { disk: { type: file, path: /dev/shm/disk0, size: 16MiB, buffered: true } }
targets: { $TARGET: { luns: { 0: disk } } }
vhost-user-scsi:
  - { socket: /run/targetd/vm.sock, targets: { 0: $TARGET } }
xen: { enabled: true }
END

need "a guest" create both /guest-commands.sh /usr/bin/sg_persist /usr/bin/sg_raw /usr/bin/sg_turs \
    /usr/bin/scsi-command $(libraries /usr/bin/scsi-command)
serve
need "it gets the disk" targetctl xen attach --no-wait both $TARGET:0,0:0:0:0
xl unpause both
need "it takes commands" within 120 said both "takes commands"
mkfifo /tmp/lines
scsi-command /run/targetd/vm.sock < /tmp/lines > /tmp/answers 2>&1 &
front_end=$!
exec 3> /tmp/lines
# other LINE: sends a command as the other initiator, and prints its answer
other() {
    before=$(wc -l < /tmp/answers)
    echo "$1" >&3
    within 60 sh -c "[ \$(wc -l < /tmp/answers) -gt $before ]"
    tail -n 1 /tmp/answers
}
# answers PATTERN LINE: whether the other initiator gets such an answer
answers() { other "$2" | tee /tmp/answer | grep -q "$1" || { cat /tmp/answer; return 1; }; }
TUR=000000000000
other $TUR > /dev/null
need "a vhost-user front-end has the same disk" answers "status 00" $TUR
inside both sg_turs /dev/sda > /dev/null
check "a reset by the Xen guest is its unit attention" inside both sg_reset -N -d /dev/sda
check "which it gets once" answers "status 02 key 6 asc 29" $TUR
check "and not again" answers "status 00" $TUR
inside both sg_turs /dev/sda > /dev/null
check "the Xen guest reserves the disk" inside both "sg_persist --out --register --param-sark=0x1 /dev/sda &&
    sg_persist --out --reserve --param-rk=0x1 --prout-type=3 /dev/sda"
check "the front-end gets RESERVATION CONFLICT" answers "status 18" "28000000000000000100 in=512"
check "it registers a key" answers "status 00" \
    "5f000000000000001800 out=000000000000000000000000000000bb0000000000000000"
check "and clears the reservation" answers "status 00" \
    "5f030000000000001800 out=00000000000000bb00000000000000000000000000000000"
check "RESERVATIONS PREEMPTED is the Xen guest's unit attention" inside both \
    "sg_turs /dev/sda 2>&1 | grep -i 'reservations preempted'"
check "the front-end reads again" answers "status 00" "28000000000000000100 in=512"
inside both sg_raw -s 512 -i /dev/zero /dev/sda 2a 00 00 00 00 64 00 00 01 00 > /dev/null
inside both "echo count 100 150 | scsi-command /dev/sg0" > /tmp/counted &
counter=$!
check "both count in one block by COMPARE AND WRITE" answers "counted 150" "count 100 150"
wait $counter
check "the Xen guest too" grep "counted 150" /tmp/counted
check "no update is lost: the sum is 300" answers "status 00 in 2c01000000000000" "28000000006400000100 in=512"
grep -h retries /tmp/counted /tmp/answers
exec 3>&-
wait $front_end
check "the guest has nothing to complain about" inside both \
    "! dmesg | grep -iE 'illegal rqid|disabling device|still in use by|I/O error|BUG:|WARNING:'"
tell both end
need "the guest ends" within 120 stopped both
kill -TERM $server
wait $server
result=$?
check "the daemon stops in good order" test $result = 0
[ $failures = 0 ] || report
finish
