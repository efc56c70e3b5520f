# Checks of stop, restart and watchdog; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

restarts_a_crashed_service_after_a_second() {
    systemctl start handout
    is handout.service RestartUSec 1s
    local before
    before=$(pid)
    kill -ABRT "$before"
    local began=${EPOCHREALTIME/./}
    another_is_there() { ask 127.0.0.1 6789 | is_time && [ "$(pid)" -ne "$before" ]; }
    within 10 another_is_there 2>/dev/null
    local took=$(((${EPOCHREALTIME/./} - began) / 1000))
    echo "back after $took ms"
    [ $took -ge 900 ] && [ $took -lt 3000 ]
}

stops_within_the_grace_period() {
    systemctl start handout
    mark
    systemctl stop handout
    is handout.service Result success
    is handout.service ExecMainStatus 0
    is handout.service ActiveState inactive
    says 'stopped: 0 connections reset'
}

restarts_after_a_kill() {
    drop_in handout.service <<<$'[Service]\nRestartSec=100ms'
    systemctl start handout
    local before
    before=$(pid)
    kill -KILL "$before"
    within 10 is handout.service NRestarts 1
    within 10 is handout.service ActiveState active
    [ "$(pid)" -ne "$before" ]
    ask 127.0.0.1 6789 | is_time
}

does_not_restart_with_a_wrong_configuration() {
    echo junk >"$CONFIG"
    drop_in handout.service <<<$'[Service]\nRestartSec=100ms'
    refused systemctl start handout
    is handout.service ExecMainStatus 78
    is handout.service NRestarts 0
    is handout.service ActiveState failed
}

waits_for_an_address_that_appears_late() {
    drop_in handout.service <<<$'[Service]\nRestartSec=100ms'
    nc -d -l 127.0.0.1 5566 &
    within 5 grep -q ':15BE 00000000:0000 0A' /proc/net/tcp
    refused systemctl start handout
    is handout.service ExecMainStatus 1
    within 5 is handout.service NRestarts 2
    kill $!
    within 10 is handout.service ActiveState active
}

# Succeeds once systemd has reported a watchdog timeout.
watchdog_ends_it() {
    within 20 says "Failed with result 'watchdog'"
    within 20 is handout.service ActiveState active
    ask 127.0.0.1 6789 | is_time
}

replaces_a_stopped_process() {
    drop_in handout.service <<<$'[Service]\nRestartSec=100ms\nWatchdogSec=1s\nTimeoutStopSec=1s'
    systemctl start handout
    mark
    kill -STOP "$(pid)"
    watchdog_ends_it
}

# Holds the serving threads one by one; the main thread keeps running.
replaces_a_process_with_a_hung_event_loop() {
    drop_in handout.service <<<$'[Service]\nRestartSec=100ms\nWatchdogSec=1s\nTimeoutStopSec=1s'
    systemctl start handout
    mark
    python3 /root/hold.py "$(pid)" &
    watchdog_ends_it
    wait $!
}

feeds_the_watchdog() {
    drop_in handout.service <<<$'[Service]\nWatchdogSec=300ms'
    systemctl start handout
    local before
    before=$(pid)
    local end=$((SECONDS + 3))
    until [ $SECONDS -ge $end ]; do ask 127.0.0.1 6789 >/dev/null; done
    [ "$(pid)" = "$before" ]
}
