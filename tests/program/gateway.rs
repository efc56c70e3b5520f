//! From end to end: pictures that are listed over HTTPS are handed out over plain TCP.

use std::fs;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::common::{Daemon, eventually, sample, says};
use crate::servers::Place;
use crate::web::Nginx;

/// How many pictures there are.
const PICTURES: u64 = 200;

/// A second in the past.
const THEN: u64 = 1_700_000_000;

#[test]
fn mirrors_two_hundred_pictures_once_and_serves_them_unchanged() {
    let nginx = Nginx::start();
    let picture = |number: u64| {
        let size = 500 + usize::try_from(number * number % 997).unwrap() * 100;
        sample(1000 + number, size)
    };
    let name = |number: u64| format!("picture {number} 图.png");
    let mut list = Vec::new();
    for number in 0..PICTURES {
        let content = picture(number);
        nginx.has(&format!("{number}.png"), &content, THEN + number);
        let digest: String =
            Sha256::digest(&content).iter().map(|it| format!("{it:02x}")).collect();
        list.push(
            json!({"picUrl": format!("{number}.png"), "title": name(number), "sha256": digest}),
        );
    }
    nginx.has("pictures.json", json!({ "newslist": list }).to_string().as_bytes(), THEN);
    // What is handed out is not there before the mirror has created it.
    let folder = tempfile::tempdir().unwrap();
    let config = |more: &str| {
        format!(
            "[mirror.pictures]\nsource = \"{}\"\nlist = \"/newslist\"\nurl = \"/picUrl\"\n\
             filename = \"/title\"\nca-file = \"{}\"\ninto = \"files/pictures\"\nevery = \"1s\"\n\
             content-types = [\"image/png\"]\n{more}\
             [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n",
            nginx.url("pictures.json"),
            nginx.authority()
        )
    };
    let daemon = Daemon::start_in(folder, &config(""), |_| {});
    let runs = || {
        let lines = daemon.lines().into_iter();
        lines.filter(|line| says(line, ": mirrored: ")).collect::<Vec<_>>()
    };
    eventually("the first run", || !runs().is_empty());
    assert_eq!(runs()[0]["new"], PICTURES, "{}", runs()[0]);

    let place = Place::new();
    place.fetch(daemon.tcp("file.files"), ["--all", "-o", "copy"]).succeeded();
    assert_eq!(fs::read_dir(place.path("copy/pictures")).unwrap().count() as u64, PICTURES);
    for number in 0..PICTURES {
        assert!(
            place.read(&format!("copy/pictures/{}", name(number))) == picture(number),
            "{number}"
        );
    }

    eventually("the second run", || runs().len() >= 2);
    let line = &runs()[1];
    assert_eq!(line["unchanged"], PICTURES, "{line}");
    let requests = usize::try_from(PICTURES).unwrap() + 1;
    for request in &nginx.requests_after(requests, requests)[..requests] {
        assert_eq!((&request["status"], &request["sent"]), (&json!(304), &json!(0)), "{request}");
    }
    // A matching digest makes a request for the file unnecessary.
    daemon.reload(&config("sha256 = \"/sha256\"\n"));
    let before = runs().len();
    eventually("a run with digests", || runs().len() >= before + 2);
    assert_eq!(runs().last().unwrap()["unchanged"], PICTURES);
}
