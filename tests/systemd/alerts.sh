# Checks of alert mails under the shipped unit; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

# End to end: state folder, sandbox, and a mail server in the guest.
mails_a_missing_file_and_its_return() {
    rm -rf /run/mails && mkdir /run/mails
    python3 -W ignore /root/mail.py >/dev/null 2>&1 &
    local mails=$!
    # shellcheck disable=SC2064
    trap "kill $mails" EXIT
    within 10 test -s /run/mails/port
    install -m 644 /etc/handout/picture.jpg /etc/handout/other.jpg
    cat >"$CONFIG" <<END
[file.other]
listen = ["127.0.0.1:5566"]
path = "other.jpg"
[mail.ops]
server = "127.0.0.1:$(cat /run/mails/port)"
security = "none"
from = "handout@example.org"
to = ["ops@example.org"]
[alert]
to = ["mail.ops"]
on = ["file-missing"]
wait = "2s"
END
    handout check --connect
    systemctl restart handout.service
    rm /etc/handout/other.jpg
    # Up to 1 s for the file check, 0.5 s for the health check, and `wait`.
    within 10 test -e /run/mails/0
    grep -q '^Subject: .*: file-missing: file.other' /run/mails/0
    install -m 644 /etc/handout/picture.jpg /etc/handout/other.jpg
    within 10 test -e /run/mails/1
    grep -q '^Subject: .*: over: file-missing: file.other' /run/mails/1
    told() { journal -o cat | grep -c 'alert sent over mail.ops'; }
    both_are_logged() { [ "$(told)" -eq 2 ]; }
    within 5 both_are_logged
    # The queue is in the state folder of the unit.
    [ -s /var/lib/handout/.handout-alerts.json ]
    # The alert survives a dead mail server and a restart.
    kill "$mails"
    rm /etc/handout/other.jpg
    waits() { grep -q 'file-missing: file.other' /var/lib/handout/.handout-alerts.json; }
    within 10 waits
    install -m 644 /etc/handout/picture.jpg /etc/handout/other.jpg
    python3 -W ignore /root/mail.py >/dev/null 2>&1 &
    mails=$!
    # shellcheck disable=SC2064
    trap "kill $mails" EXIT
    within 10 test -e /run/mails/again
    systemctl kill -s KILL handout.service
    within 30 test -e /run/mails/2
    grep -q '^Subject: .*: file-missing: file.other' /run/mails/2
    rm /etc/handout/other.jpg
}

# Fifty files disappear one after the other, each in its own group.
limits_the_mails_of_fifty_faults() {
    rm -rf /run/mails && mkdir /run/mails
    python3 -W ignore /root/mail.py >/dev/null 2>&1 &
    local mails=$! number
    # shellcheck disable=SC2064
    trap "kill $mails; rm -f /etc/handout/fault-*" EXIT
    within 10 test -s /run/mails/port
    : >"$CONFIG"
    # A separate channel: the hourly limit counts mails of other checks, also across a restart.
    for number in {1..50}; do
        echo "$number" >"/etc/handout/fault-$number"
        printf '[file.fault-%s]\nlisten = ["127.0.0.1:%s"]\npath = "fault-%s"\n' \
            "$number" $((20000 + number)) "$number" >>"$CONFIG"
    done
    cat >>"$CONFIG" <<END
[mail.capped]
server = "127.0.0.1:$(cat /run/mails/port)"
security = "none"
from = "handout@example.org"
to = ["ops@example.org"]
[alert]
to = ["mail.capped"]
on = ["file-missing"]
wait = "100ms"
max-per-hour = 3
END
    systemctl restart handout.service
    for number in {1..50}; do
        rm "/etc/handout/fault-$number"
        sleep 0.2
    done
    last_is_known() { journal | grep -q 'fault-50 cannot be read'; }
    within 10 last_is_known
    within 10 test -e /run/mails/2
    # Suppressed alerts are counted in the file of the queue.
    withheld() { grep -Eq '"suppressed":\{"mail.capped":[1-9]' /var/lib/handout/.handout-alerts.json; }
    within 10 withheld
    [ ! -e /run/mails/3 ]
}
