# Checks of the sandbox and the limits of the unit; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

# Maximum scores of `systemd-analyze security` (systemd 252), in tenths.
readonly SCORE_AS_SHIPPED=12 SCORE_CLOCK_STATE=14 SCORE_SOCKET_ONLY=6 SCORE_LOW_PORTS=14

passes_systemd_analyze_verify() {
    local said
    said=$(systemd-analyze verify handout.service handout.socket 2>&1)
    [ -z "$said" ] || { echo "$said"; return 1; }
    local version
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    for drop_in in /root/systemd/*.conf; do
        fresh
        shipped_drop_in "${drop_in##*/}"
        said=$(systemd-analyze verify handout.service 2>&1)
        # Its header states that it requires systemd 254.
        if [ "${drop_in##*/}" = restart-quickly.conf ] && [ "$version" -lt 254 ]; then
            said=$(grep -Ev "Unknown key( name)? '(RestartSteps|RestartMaxDelaySec)'" <<<"$said" || true)
        fi
        [ -z "$said" ] || { echo "$drop_in: $said"; return 1; }
    done
}

has_a_low_exposure_score() {
    score_is_at_most "$SCORE_AS_SHIPPED"
    shipped_drop_in clock-state.conf
    score_is_at_most "$SCORE_CLOCK_STATE"
    shipped_drop_in socket-only.conf
    score_is_at_most "$SCORE_SOCKET_ONLY"
    fresh
    shipped_drop_in socket-only.conf
    score_is_at_most "$SCORE_SOCKET_ONLY"
    fresh
    shipped_drop_in low-ports.conf
    score_is_at_most "$SCORE_LOW_PORTS"
}

lets_other_users_connect_to_unix_sockets() {
    printf '[time.clock]\nlisten = ["unix:/run/handout/clock.sock"]\n' >"$CONFIG"
    systemctl start handout
    ask -U /run/handout/clock.sock | is_time
    runuser -u nobody -- nc -d -w 5 -U /run/handout/clock.sock | is_time
    systemctl stop handout
    [ ! -e /run/handout ]
}

passes_credentials_only_to_the_service() {
    echo secret >/etc/handout/password
    chmod 600 /etc/handout/password
    drop_in handout.service <<<$'[Service]\nLoadCredential=password:/etc/handout/password'
    systemctl start handout
    local file=/run/credentials/handout.service/password
    tr '\0' '\n' <"/proc/$(pid)/environ" | grep -Fx "CREDENTIALS_DIRECTORY=${file%/*}"
    # As the user of the service, in its mount namespace.
    local user
    user=$(stat -c %u "/proc/$(pid)")
    [ "$(nsenter -t "$(pid)" -m setpriv --reuid "$user" --clear-groups cat $file)" = secret ]
    refused runuser -u nobody -- cat $file
}

raises_the_descriptor_limit() {
    systemctl start handout
    is handout.service LimitNOFILE 524288
    is handout.service LimitNOFILESoft 524288
    # The limit of the container may be lower.
    local most
    most=$(ulimit -Hn)
    [ "$most" -lt 524288 ] || most=524288
    awk -v most="$most" '/^Max open files/ { exit !($4 == most && $5 == most) }' "/proc/$(pid)/limits"
}

runs_without_privileges() {
    systemctl start handout
    local status
    status=$(cat "/proc/$(pid)/status")
    for line in NoNewPrivs:.1 Seccomp:.2 CapBnd:.0000000000000000 CapEff:.0000000000000000; do
        grep -qx "$line" <<<"$status"
    done
    [ "$(stat -c %u "/proc/$(pid)")" -ne 0 ]
}

needs_a_drop_in_for_low_ports() {
    printf '[time.clock]\nlisten = ["127.0.0.1:13", "udp:127.0.0.1:37"]\n' >"$CONFIG"
    # The kernel of the container may not restrict low ports.
    echo 1024 >/proc/sys/net/ipv4/ip_unprivileged_port_start
    mark
    refused systemctl start handout
    says CAP_NET_BIND_SERVICE
    systemctl stop handout
    shipped_drop_in low-ports.conf
    systemctl start handout
    ask 127.0.0.1 13 | is_time
    ask_udp 127.0.0.1 37 | is_time
}
