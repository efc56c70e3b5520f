# Checks of `systemctl reload`; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

changes_services_on_reload() {
    systemctl start handout
    local before
    before=$(pid)
    cat >"$CONFIG" <<END
[time.clock]
[time.more]
listen = ["127.0.0.1:6790"]
END
    # `systemctl reload` waits for the end of the reload.
    systemctl reload handout
    ask 127.0.0.1 6790 | is_time
    ask 127.0.0.1 6789 | is_time
    refused nc -z 127.0.0.1 5566
    [ "$(pid)" = "$before" ]
    is handout.service StatusText 'serving time.clock, time.more on 2 addresses'
    is handout.service ActiveState active
}

keeps_the_old_configuration_on_a_faulty_reload() {
    systemctl start handout
    local before status
    before=$(pid) status=$(property handout.service StatusText)
    printf '[time.clock]\njunk = 1\n' >"$CONFIG"
    mark
    refused systemctl reload handout
    # The daemon logs the fault and `handout reload` prints it.
    says 'reload failed, nothing was changed: .*handout.toml:2: time.clock.junk'
    says '^handout: .*handout.toml:2: time.clock.junk'
    reload_failed junk
    is handout.service ActiveState active
    # With SIGHUP alone.
    cp /root/handout.toml "$CONFIG"
    kill -HUP "$(pid)"
    within 5 is handout.service StatusText "$status"
    printf '[time.clock]\njunk = 1\n' >"$CONFIG"
    kill -HUP "$(pid)"
    within 5 reload_failed junk
    within 5 is handout.service ActiveState active
    ask 127.0.0.1 5566 | jq -e .filedata >/dev/null
    [ "$(pid)" = "$before" ]
    cp /root/handout.toml "$CONFIG"
    systemctl reload handout
    is handout.service StatusText "$status"
}

reload_failed() { property handout.service StatusText | grep -q "reload failed, nothing was changed: .*$1"; }

reloads_are() {
    local metrics
    metrics=$(get /metrics)
    grep -Exq "handout_reloads_total\{outcome=\"done\"\} $1(\.0)?" <<<"$metrics"
    grep -Exq "handout_reloads_total\{outcome=\"failed\"\} $2(\.0)?" <<<"$metrics"
    grep -Exq "handout_config_last_reload_successful $3(\.0)?" <<<"$metrics"
}

# Exit code, metrics, log, status line and alert, with a secret that only the service can read.
fails_a_reload_only_if_the_configuration_is_rejected() {
    rm -rf /run/mails && mkdir /run/mails
    python3 -W ignore /root/mail.py >/dev/null 2>&1 &
    # shellcheck disable=SC2064
    trap "kill $!; rm -f /etc/handout/token" EXIT
    within 10 test -s /run/mails/port
    echo secret >/etc/handout/token
    chmod 600 /etc/handout/token
    drop_in handout.service <<<$'[Service]\nLoadCredential=token:/etc/handout/token'
    cat >"$CONFIG" <<END
[time.clock]
[metrics]
[mirror.own]
urls = ["http://127.0.0.1:9467/healthz"]
into = "/var/lib/handout/own"
bearer-token-file = "token"
[mail.ops]
server = "127.0.0.1:$(cat /run/mails/port)"
security = "none"
from = "handout@example.org"
to = ["ops@example.org"]
[alert]
to = ["mail.ops"]
on = ["reload-failed"]
wait = "200ms"
END
    cp "$CONFIG" /run/good.toml
    systemctl start handout
    systemctl reload handout
    reloads_are 1 0 1

    echo 'junk = 1' >>"$CONFIG"
    mark
    refused systemctl reload handout
    reloads_are 1 1 0
    reload_failed alert.junk
    says 'reload failed, nothing was changed: .*alert.junk'
    within 10 grep -q 'reload-failed: configuration' /run/mails/0
    grep -q 'alert.junk' /run/mails/0

    cp /run/good.toml "$CONFIG"
    systemctl reload handout
    reloads_are 2 1 1
    refused reload_failed .
    within 10 grep -q 'over: reload-failed: configuration' /run/mails/1

    # With an address in use.
    nc -d -l 127.0.0.1 7777 &
    within 5 grep -q ':1E61 00000000:0000 0A' /proc/net/tcp
    printf '[time.more]\nlisten = ["127.0.0.1:7777"]\n' >>"$CONFIG"
    mark
    refused systemctl reload handout
    reloads_are 2 2 0
    reload_failed 'another program listens there'
    says '^handout: time.more: cannot listen on 127.0.0.1:7777'
    kill $!
    wait $! || true
    systemctl reload handout
    reloads_are 3 2 1
    ask 127.0.0.1 7777 | is_time

    # As root and as another user.
    handout reload | grep -q '^reloaded: '
    reloads_are 4 2 1
    refused runuser -u nobody -- handout reload
    reloads_are 4 2 1
    systemctl stop handout
    [ ! -e /run/handout ]
    local code=0
    handout reload || code=$?
    [ $code -eq 1 ]
}
