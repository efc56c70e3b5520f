# Checks of socket activation; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

# Succeeds if the service and systemd hold the same sockets, by inode.
sockets_are_inherited() {
    local port=$1 inode
    inode=$(ss -Hlnet "sport = :$port" | sed -n 's/.* ino:\([0-9]*\) .*/\1/p')
    for process in 1 "$(pid)"; do
        [ -n "$(find "/proc/$process/fd" -lname "socket:\[$inode\]")" ]
    done
}

starts_on_the_first_connection() {
    systemctl start handout.socket
    is handout.service ActiveState inactive
    ask 127.0.0.1 5566 | jq -e .filedata >/dev/null
    is handout.service ActiveState active
    ask 127.0.0.1 6789 | is_time
    ask_udp 127.0.0.1 6789 | is_time
    sockets_are_inherited 5566
    sockets_are_inherited 6789
    # The next client starts it again after only the service was stopped.
    systemctl stop handout.service
    is handout.socket ActiveState active
    ask_udp 127.0.0.1 6789 | is_time
    is handout.service ActiveState active
}

matches_sockets_by_address() {
    drop_in handout.socket <<END
[Socket]
ListenStream=
ListenDatagram=
ListenStream=0.0.0.0:6789
ListenStream=[::]:6789
ListenDatagram=[::1]:6790
ListenStream=127.0.0.1:13
ListenStream=/run/handout.sock
END
    cat >"$CONFIG" <<END
[time.clock]
listen = ["0.0.0.0:6789", "[::]:6789", "udp:[::1]:6790", "unix:/run/handout.sock"]
[time.low]
listen = ["127.0.0.1:13"]
END
    systemctl start handout.socket
    ask 127.0.0.1 6789 | is_time
    ask ::1 6789 | is_time
    ask_udp ::1 6790 | is_time
    ask 127.0.0.1 13 | is_time
    runuser -u nobody -- nc -d -w 5 -U /run/handout.sock | is_time
    sockets_are_inherited 13
    systemctl restart handout
    ask -U /run/handout.sock | is_time
    is handout.service StatusText 'serving time.clock, time.low on 5 addresses'
}

matches_sockets_by_name() {
    cat >"$UNITS/handout-clock.socket" <<END
[Socket]
ListenStream=127.0.0.1:7001
ListenDatagram=127.0.0.1:7001
ListenStream=/run/handout-clock.sock
FileDescriptorName=clock
Service=handout.service
END
    cat >"$CONFIG" <<END
[time.clock]
listen = ["systemd:clock"]
[file.picture]
path = "picture.jpg"
[time.default]
listen = ["systemd:handout"]
END
    systemctl daemon-reload
    systemctl start handout.socket handout-clock.socket
    ask 127.0.0.1 7001 | is_time
    ask_udp 127.0.0.1 7001 | is_time
    ask -U /run/handout-clock.sock | is_time
    ask 127.0.0.1 6789 | is_time
    ask 127.0.0.1 5566 | jq -e .filedata >/dev/null
    systemctl reload handout
    within 5 is handout.service ActiveState active
    ask -U /run/handout-clock.sock | is_time
    rm "$UNITS/handout-clock.socket"
}

rejects_an_unused_socket() {
    printf '[time.clock]\nlisten = ["127.0.0.1:6789", "udp:127.0.0.1:6789"]\n' >"$CONFIG"
    systemctl start handout.socket
    mark
    refused systemctl start handout
    is handout.service ExecMainStatus 78
    within 5 says '127.0.0.1:5566'
}

rejects_an_entry_without_a_socket() {
    printf '[time.clock]\nlisten = ["systemd:nowhere"]\n' >"$CONFIG"
    mark
    refused systemctl start handout
    is handout.service ExecMainStatus 78
    within 5 says 'nowhere'
}

refuses_no_connection_during_a_restart() {
    systemctl start handout.socket handout.service
    restart_often() { for _ in 1 2 3 4 5; do systemctl restart handout.service; done; }
    under_load restart_often
    # The measurement can fail: without the socket unit, connections are refused.
    fresh
    systemctl start handout.service
    refused under_load restart_often
}

refuses_no_connection_after_a_kill() {
    drop_in handout.service <<<$'[Service]\nRestartSec=100ms'
    systemctl start handout.socket handout.service
    kill -KILL "$(pid)"
    ask 127.0.0.1 6789 | is_time
    within 10 is handout.service ActiveState active
}

recovers_sockets_that_were_given_up() {
    systemctl --quiet enable handout.socket
    systemctl start handout.socket
    echo junk >"$CONFIG"
    # Each start fails while a client waits, until systemd gives up.
    ask 127.0.0.1 6789 &
    within 20 is handout.socket ActiveState failed
    cp /root/handout.toml "$CONFIG"
    systemctl start handout.service
    is handout.socket ActiveState active
    sockets_are_inherited 6789
}

takes_over_when_the_socket_is_enabled() {
    systemctl start handout.service
    systemctl --quiet enable handout.socket
    systemctl restart handout.service
    is handout.socket ActiveState active
    sockets_are_inherited 6789
}

serves_the_shipped_configuration_without_a_network() {
    shipped_drop_in socket-only.conf
    # Starting the service starts its sockets.
    systemctl start handout.service
    is handout.socket ActiveState active
    ask 127.0.0.1 6789 | is_time
    ask_udp 127.0.0.1 6789 | is_time
    ask 127.0.0.1 5566 | jq -e .filedata >/dev/null
    printf 'GET /healthz HTTP/1.0\r\n\r\n' | nc -N -w 5 127.0.0.1 9467 | grep -q '^HTTP/1.1 200 '
}

has_no_network_of_its_own_with_socket_only() {
    shipped_drop_in socket-only.conf
    shipped_drop_in clock-state.conf
    drop_in handout.socket <<END
[Socket]
ListenStream=/run/handout.sock
ListenStream=10.99.0.2:6789
ListenDatagram=10.99.0.2:6789
END
    cat >"$CONFIG" <<END
[time.clock]
listen = ["127.0.0.1:6789", "udp:127.0.0.1:6789", "unix:/run/handout.sock", "10.99.0.2:6789", "udp:10.99.0.2:6789"]
format = "json"
[file.picture]
path = "picture.jpg"
[time.local]
listen = ["unix:/run/handout/own.sock"]
[metrics]
listen = ["127.0.0.1:9467"]
END
    systemctl start handout.service
    ask 127.0.0.1 6789 | jq -e '."max-error-us" | type == "number"'
    ask_udp 127.0.0.1 6789 | jq -e .time
    ask -U /run/handout.sock | jq -e .time
    ask -U /run/handout/own.sock | is_time
    ask 127.0.0.1 5566 | jq -e .filedata >/dev/null
    # Only a private loopback device.
    [ "$(grep -c : "/proc/$(pid)/net/dev")" -eq 1 ]
    logged() { journal -o json SERVICE=file.picture OUTCOME=complete | jq -se 'length == 1' >/dev/null; }
    within 5 logged
    systemctl reload handout
    within 5 is handout.service ActiveState active
    # Binding an unreachable address fails.
    sed -i 's/^\[file.picture\]/&\nlisten = ["127.0.0.1:5566", "127.0.0.1:5577"]/' "$CONFIG"
    kill -HUP "$(pid)"
    failure_is_told() { property handout.service StatusText | grep -q 'nothing was changed'; }
    within 5 failure_is_told
}

serve_the_network_without_one() {
    shipped_drop_in socket-only.conf
    drop_in handout.socket <<END
[Socket]
ListenStream=
ListenStream=10.99.0.2:6789
ListenStream=[fd99::2]:6789
ListenDatagram=10.99.0.2:6789
END
    printf '[time.clock]\nlisten = ["systemd:handout"]\n' >"$CONFIG"
    systemctl start handout.service
}

# Connects from another network namespace to sockets that systemd created.
answers_other_machines_without_a_network() {
    in_guest 'fresh; serve_the_network_without_one'
    for address in 10.99.0.2 fd99::2; do
        "$boot" client -t 10 "$guest" -- bash -c "cat </dev/tcp/$address/6789" | is_time
    done
    # shellcheck disable=SC2016
    "$boot" client -t 10 "$guest" -- bash -c \
        'exec 3<>/dev/udp/10.99.0.2/6789; echo >&3; head -c 27 <&3' | is_time
}
