//! The bytes of every message.

use bytes::Bytes;
use murphy_fs::{PackName, WriterId};
use murphy_log::{
    BranchId, FRAME_HEADER_BYTES, Frame, FrameHeader, LogTime, NodeId, UnverifiedFrame, VolumeId,
};

use super::{
    Ack, Admitted, Announce, Ask, Frames, HEADER_BYTES, Heartbeat, Hello, LendRequest, MAX_DETAIL_BYTES,
    MAX_PACK_BYTES, MAX_RUN_BYTES, MAX_RUN_FRAMES, Message, MessageError, MessageFault, PackReply,
    PackRequest, Redeem, Refusal, Refused, Resume, SEED_PART_BYTES, Seal, Sealed, SeedPart, SeedReason,
    Stands, Verdict, WIRE_VERSION, Welcome,
    fields::{FieldReader, FieldWriter},
    proof::{PROOF, read_proof, write_proof},
};
use crate::{
    history::Lookup,
    token::{MAX_ADDRESSES, MAX_NAME_BYTES, SECRET_BYTES, Secret},
};

/// What the header of a message says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageHeader {
    kind: Kind,
    /// The length of the body, in bytes, within the limit of the kind.
    pub body_len: usize,
}

impl MessageHeader {
    /// Reads a header and checks version, kind and length.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<MessageHeader, MessageError> {
        let [l0, l1, l2, l3, version, kind, r0, r1] = *bytes;
        let error = |message, offset, what| Err(MessageError { message, offset, what });
        if version != WIRE_VERSION {
            return error("unknown", 4, MessageFault::Version(version));
        }
        let Some(kind) = Kind::ALL.into_iter().find(|known| *known as u8 == kind) else {
            return error("unknown", 5, MessageFault::Kind(kind));
        };
        if [r0, r1] != [0, 0] {
            return error(kind.name(), 6, MessageFault::Field("reserved bytes"));
        }
        let (length, limit) = (u32::from_le_bytes([l0, l1, l2, l3]) as usize, kind.limit());
        if length > limit {
            return error(kind.name(), 0, MessageFault::TooLong { length, limit });
        }
        Ok(MessageHeader { kind, body_len: length })
    }

    /// Reads the body that belongs to this header.
    pub fn decode(&self, body: &Bytes) -> Result<Message, MessageError> {
        let mut reader = FieldReader::new(self.kind.name(), body);
        let message = decode_body(self.kind, &mut reader)?;
        reader.finish()?;
        Ok(message)
    }
}

impl Message {
    /// The bytes of the message, header included.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        let kind = encode_body(self, &mut FieldWriter(&mut bytes));
        let length = bytes.len() - HEADER_BYTES;
        debug_assert!(length <= kind.limit(), "{} message of {length} bytes", kind.name());
        let length = u32::try_from(length).expect("messages are below their limits");
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4] = WIRE_VERSION;
        bytes[5] = kind as u8;
        bytes
    }

    /// Reads exactly one message.
    pub fn decode(bytes: &Bytes) -> Result<Message, MessageError> {
        let short = MessageError { message: "unknown", offset: bytes.len(), what: MessageFault::Short };
        let header = MessageHeader::parse(bytes.first_chunk().ok_or_else(|| short.clone())?)?;
        let body = bytes.slice(HEADER_BYTES..);
        let (message, offset) = (header.kind.name(), body.len());
        match body.len().checked_sub(header.body_len) {
            None => Err(MessageError { message, ..short }),
            Some(0) => header.decode(&body),
            Some(trailing) => Err(MessageError { message, offset, what: MessageFault::Trailing(trailing) }),
        }
    }

    /// What the message is called.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Welcome(_) => Kind::Welcome,
            Message::Frames(_) => Kind::Frames,
            Message::Ack(_) => Kind::Ack,
            Message::Heartbeat(_) => Kind::Heartbeat,
            Message::Probe { .. } => Kind::Probe,
            Message::Probed { .. } => Kind::Probed,
            Message::SeedOffer { .. } => Kind::SeedOffer,
            Message::SeedPart(_) => Kind::SeedPart,
            Message::SeedDone { .. } => Kind::SeedDone,
            Message::PackRequest(_) => Kind::PackRequest,
            Message::PackReply(_) => Kind::PackReply,
            Message::Refused(_) => Kind::Refused,
            Message::Redeem(_) => Kind::Redeem,
            Message::Admitted(_) => Kind::Admitted,
            Message::Seal(_) => Kind::Seal,
            Message::Sealed(_) => Kind::Sealed,
            Message::Announce(_) => Kind::Announce,
            Message::Ask(_) => Kind::Ask,
            Message::Stands(_) => Kind::Stands,
            Message::LendRequest(_) => Kind::LendRequest,
        }
    }
}

macro_rules! kinds {
    ($($name:ident = $number:literal, $text:literal, $limit:expr;)*) => {
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        enum Kind {
            $($name = $number,)*
        }

        impl Kind {
            const ALL: [Kind; [$($number),*].len()] = [$(Kind::$name),*];

            fn name(self) -> &'static str {
                match self {
                    $(Kind::$name => $text,)*
                }
            }

            /// The largest body, in bytes.
            fn limit(self) -> usize {
                match self {
                    $(Kind::$name => $limit,)*
                }
            }
        }
    };
}

kinds! {
    Hello = 1, "hello", SMALL;
    Welcome = 2, "welcome", SMALL;
    Frames = 3, "frames", 17 + MAX_RUN_BYTES;
    Ack = 4, "ack", SMALL;
    Heartbeat = 5, "heartbeat", SMALL;
    Probe = 6, "probe", SMALL;
    Probed = 7, "probed", SMALL;
    SeedOffer = 8, "seed offer", SMALL;
    SeedPart = 9, "seed part", SMALL;
    SeedDone = 10, "seed done", SMALL;
    PackRequest = 11, "pack request", SMALL;
    PackReply = 12, "pack reply", 1 + MAX_PACK_BYTES;
    Refused = 13, "refused", 3 + MAX_DETAIL_BYTES;
    Redeem = 14, "redeem", SECRET_BYTES + 2 + MAX_NAME_BYTES + NAMES + MAYBE_EPOCH;
    Admitted = 15, "admitted", SMALL + PROOF;
    Seal = 16, "seal", SMALL + PROOF + NAMES;
    Sealed = 17, "sealed", SMALL;
    Announce = 18, "announce", 2 * NAMES;
    Ask = 19, "ask", SMALL;
    Stands = 20, "stands", SMALL;
    LendRequest = 21, "lend request", SMALL;
}

fn encode_body(message: &Message, out: &mut FieldWriter<'_>) -> Kind {
    match message {
        Message::Hello(hello) => encode_hello(hello, out),
        Message::Welcome(welcome) => encode_welcome(welcome, out),
        Message::Frames(frames) => encode_frames(frames, out),
        Message::Ack(ack) => {
            out.position(&ack.position).lsn(ack.data_lsn);
        }
        Message::Heartbeat(heartbeat) => {
            out.state(&heartbeat.state).u64(heartbeat.time.as_nanos());
        }
        Message::Probe { lsn } => {
            out.lsn(*lsn);
        }
        Message::Probed { lsn, found } => encode_lookup(found, out.lsn(*lsn)),
        Message::SeedOffer { state } => {
            out.state(state);
        }
        Message::SeedPart(part) => {
            out.u32(part.index).u32(part.length);
        }
        Message::SeedDone { parts, bytes } => {
            out.u32(*parts).u64(*bytes);
        }
        Message::PackRequest(request) => {
            out.u64(request.pack.writer.as_u64())
                .u64(request.pack.number)
                .u64(request.offset)
                .u32(request.length);
        }
        Message::PackReply(reply) => {
            match reply {
                PackReply::Found(bytes) => out.byte(0).bytes(bytes),
                PackReply::Missing => out.byte(1),
                PackReply::Failed(why) => out.byte(2).text(why, MAX_DETAIL_BYTES),
            };
        }
        Message::Refused(refused) => {
            out.byte(refused.reason as u8).text(&refused.detail, MAX_DETAIL_BYTES);
        }
        Message::Redeem(redeem) => {
            out.bytes(redeem.secret.as_bytes()).text(&redeem.name, MAX_NAME_BYTES);
            encode_addresses(&redeem.addresses, out);
            out.optional(redeem.promised, FieldWriter::epoch);
        }
        Message::Admitted(admitted) => encode_admitted(admitted, out),
        Message::Seal(seal) => encode_seal(seal, out),
        Message::Sealed(sealed) => {
            out.epoch(sealed.epoch).optional(sealed.state.as_ref(), FieldWriter::state);
            out.lsn(sealed.data_lsn).lsn(sealed.heard_lsn);
        }
        Message::Announce(announce) => {
            encode_addresses(&announce.addresses, out);
            encode_addresses(&announce.domains, out);
        }
        Message::Ask(ask) => {
            out.bytes(ask.volume.as_bytes()).bytes(ask.branch.as_bytes());
            out.optional(ask.epoch, FieldWriter::epoch);
        }
        Message::Stands(stands) => {
            out.optional(stands.state.as_ref(), FieldWriter::state);
            out.lsn(stands.data_lsn).lsn(stands.heard_lsn).optional(stands.promised, FieldWriter::epoch);
        }
        Message::LendRequest(request) => {
            out.point(&request.after).lsn(request.to);
        }
    }
    message.kind()
}

fn encode_addresses(addresses: &[String], out: &mut FieldWriter<'_>) {
    let addresses = addresses.iter().take(MAX_ADDRESSES);
    out.byte(addresses.len() as u8);
    addresses.for_each(|address| {
        out.text(address, MAX_NAME_BYTES);
    });
}

fn encode_admitted(admitted: &Admitted, out: &mut FieldWriter<'_>) {
    out.bytes(admitted.volume.as_bytes()).bytes(admitted.branch.as_bytes()).byte(admitted.role.code());
    write_proof(&admitted.proof, out);
}

fn encode_seal(seal: &Seal, out: &mut FieldWriter<'_>) {
    out.bytes(seal.volume.as_bytes()).bytes(seal.branch.as_bytes()).epoch(seal.epoch);
    write_proof(&seal.proof, out);
    encode_addresses(&seal.leads, out);
}

fn encode_hello(hello: &Hello, out: &mut FieldWriter<'_>) {
    out.bytes(hello.volume.as_bytes()).bytes(hello.branch.as_bytes()).bytes(hello.node.as_bytes());
    match &hello.resume {
        Resume::Fresh => out.byte(0),
        Resume::After(position) => out.byte(1).position(position),
        Resume::From(lsn) => out.byte(2).lsn(*lsn),
    };
    out.lsn(hello.data_lsn).optional(hello.promised, FieldWriter::epoch);
}

fn encode_welcome(welcome: &Welcome, out: &mut FieldWriter<'_>) {
    out.bytes(welcome.volume.as_bytes()).bytes(welcome.branch.as_bytes()).bytes(welcome.node.as_bytes());
    out.state(&welcome.state).epoch(welcome.epoch).lsn(welcome.first);
    out.byte(match welcome.verdict {
        Verdict::Tail => 0,
        Verdict::Seed(SeedReason::Fresh) => 1,
        Verdict::Seed(SeedReason::Trimmed) => 2,
        Verdict::Diverged => 3,
    });
}

fn encode_lookup(found: &Lookup, out: &mut FieldWriter<'_>) {
    match found {
        Lookup::End(point) => out.byte(0).point(point),
        Lookup::Inside { before, end } => out.byte(1).point(before).point(end),
        Lookup::Trimmed { first } => out.byte(2).lsn(*first),
        Lookup::Beyond { durable } => out.byte(3).lsn(*durable),
    };
}

/// Small runs go as they are, for their latency; the bodies of larger ones are compressed together if that makes them smaller.
fn encode_frames(frames: &Frames, out: &mut FieldWriter<'_>) {
    let count = u32::try_from(frames.run.len()).expect("runs are below their limit");
    let stored: usize = frames.run.iter().map(|frame| frame.bytes().len()).sum();
    out.lsn(frames.durable_lsn);
    if stored >= COMPRESSED_FROM_BYTES {
        let mut bodies = Vec::with_capacity(stored);
        frames.run.iter().for_each(|frame| bodies.extend_from_slice(&frame.bytes()[FRAME_HEADER_BYTES..]));
        match zstd::bulk::compress(&bodies, COMPRESSION_LEVEL) {
            Ok(compressed) if compressed.len() < bodies.len() => {
                out.byte(1).u32(count);
                frames.run.iter().for_each(|frame| {
                    out.bytes(&frame.bytes()[..FRAME_HEADER_BYTES]);
                });
                out.bytes(&compressed);
                return;
            }
            // What does not shrink, or cannot be compressed for whatever reason, goes as it is.
            Ok(_) | Err(_) => {}
        }
    }
    out.byte(0).u32(count);
    frames.run.iter().for_each(|frame| {
        out.bytes(frame.bytes());
    });
}

fn decode_body(kind: Kind, r: &mut FieldReader<'_>) -> Result<Message, MessageError> {
    Ok(match kind {
        Kind::Hello => Message::Hello(decode_hello(r)?),
        Kind::Welcome => Message::Welcome(decode_welcome(r)?),
        Kind::Frames => Message::Frames(decode_frames(r)?),
        Kind::Ack => {
            let position = r.position()?;
            let data_lsn =
                r.checked("data lsn above the position", FieldReader::lsn, |d| *d <= position.lsn)?;
            Message::Ack(Ack { position, data_lsn })
        }
        Kind::Heartbeat => {
            Message::Heartbeat(Heartbeat { state: r.state()?, time: LogTime::from_nanos(r.u64()?) })
        }
        Kind::Probe => Message::Probe { lsn: r.lsn()? },
        Kind::Probed => Message::Probed { lsn: r.lsn()?, found: decode_lookup(r)? },
        Kind::SeedOffer => Message::SeedOffer { state: r.state()? },
        Kind::SeedPart => {
            let index = r.u32()?;
            let good = |length: &u32| (1..=SEED_PART_BYTES).contains(&(*length as usize));
            Message::SeedPart(SeedPart { index, length: r.checked("part length", FieldReader::u32, good)? })
        }
        Kind::SeedDone => Message::SeedDone { parts: r.u32()?, bytes: r.u64()? },
        Kind::PackRequest => Message::PackRequest(decode_pack_request(r)?),
        Kind::PackReply => Message::PackReply(decode_pack_reply(r)?),
        Kind::Refused => {
            let code = r.checked("refusal", FieldReader::byte, |code| Refusal::from_code(*code).is_some())?;
            let reason = Refusal::from_code(code).ok_or_else(|| r.error(MessageFault::Field("refusal")))?;
            Message::Refused(Refused { reason, detail: r.text("detail", MAX_DETAIL_BYTES)? })
        }
        Kind::Redeem => Message::Redeem(decode_redeem(r)?),
        Kind::Admitted => {
            let (volume, branch) = (VolumeId::from_bytes(r.array()?), BranchId::from_bytes(r.array()?));
            let role = r.role()?;
            Message::Admitted(Admitted { volume, branch, role, proof: read_proof(r)? })
        }
        Kind::Seal => Message::Seal(Seal {
            volume: VolumeId::from_bytes(r.array()?),
            branch: BranchId::from_bytes(r.array()?),
            epoch: r.epoch()?,
            proof: read_proof(r)?,
            leads: decode_addresses(r)?,
        }),
        Kind::Sealed => Message::Sealed(Sealed {
            epoch: r.epoch()?,
            state: r.optional(FieldReader::state)?,
            data_lsn: r.lsn()?,
            heard_lsn: r.lsn()?,
        }),
        Kind::Announce => {
            Message::Announce(Announce { addresses: decode_addresses(r)?, domains: decode_addresses(r)? })
        }
        Kind::Ask => Message::Ask(Ask {
            volume: VolumeId::from_bytes(r.array()?),
            branch: BranchId::from_bytes(r.array()?),
            epoch: r.optional(FieldReader::epoch)?,
        }),
        Kind::Stands => Message::Stands(Stands {
            state: r.optional(FieldReader::state)?,
            data_lsn: r.lsn()?,
            heard_lsn: r.lsn()?,
            promised: r.optional(FieldReader::epoch)?,
        }),
        Kind::LendRequest => Message::LendRequest(LendRequest { after: r.point()?, to: r.lsn()? }),
    })
}

fn decode_pack_request(r: &mut FieldReader<'_>) -> Result<PackRequest, MessageError> {
    let pack = PackName::new(WriterId::from_u64(r.u64()?), r.u64()?);
    let offset = r.u64()?;
    let length = r.checked("length", FieldReader::u32, |length| *length as usize <= MAX_PACK_BYTES)?;
    Ok(PackRequest { pack, offset, length })
}

fn decode_pack_reply(r: &mut FieldReader<'_>) -> Result<PackReply, MessageError> {
    Ok(match r.checked("answer", FieldReader::byte, |tag| *tag <= 2)? {
        0 => PackReply::Found(r.rest()),
        1 => PackReply::Missing,
        _ => PackReply::Failed(r.text("reason", MAX_DETAIL_BYTES)?),
    })
}

fn decode_hello(r: &mut FieldReader<'_>) -> Result<Hello, MessageError> {
    Ok(Hello {
        volume: VolumeId::from_bytes(r.array()?),
        branch: BranchId::from_bytes(r.array()?),
        node: NodeId::from_bytes(r.array()?),
        resume: match r.checked("resume", FieldReader::byte, |tag| *tag <= 2)? {
            0 => Resume::Fresh,
            1 => Resume::After(r.position()?),
            _ => Resume::From(r.lsn()?),
        },
        data_lsn: r.lsn()?,
        promised: r.optional(FieldReader::epoch)?,
    })
}

fn decode_welcome(r: &mut FieldReader<'_>) -> Result<Welcome, MessageError> {
    Ok(Welcome {
        volume: VolumeId::from_bytes(r.array()?),
        branch: BranchId::from_bytes(r.array()?),
        node: NodeId::from_bytes(r.array()?),
        state: r.state()?,
        epoch: r.epoch()?,
        first: r.lsn()?,
        verdict: match r.checked("verdict", FieldReader::byte, |tag| *tag <= 3)? {
            0 => Verdict::Tail,
            1 => Verdict::Seed(SeedReason::Fresh),
            2 => Verdict::Seed(SeedReason::Trimmed),
            _ => Verdict::Diverged,
        },
    })
}

fn decode_lookup(r: &mut FieldReader<'_>) -> Result<Lookup, MessageError> {
    Ok(match r.checked("answer", FieldReader::byte, |tag| *tag <= 3)? {
        0 => Lookup::End(r.point()?),
        1 => Lookup::Inside { before: r.point()?, end: r.point()? },
        2 => Lookup::Trimmed { first: r.lsn()? },
        _ => Lookup::Beyond { durable: r.lsn()? },
    })
}

fn decode_redeem(r: &mut FieldReader<'_>) -> Result<Redeem, MessageError> {
    let secret = Secret::from_bytes(r.array()?);
    let name = r.text("name", MAX_NAME_BYTES)?;
    let addresses = decode_addresses(r)?;
    Ok(Redeem { secret, name, addresses, promised: r.optional(FieldReader::epoch)? })
}

fn decode_addresses(r: &mut FieldReader<'_>) -> Result<Vec<String>, MessageError> {
    let good = |count: &u8| usize::from(*count) <= MAX_ADDRESSES;
    let count = r.checked("number of addresses", FieldReader::byte, good)?;
    (0..count).map(|_| r.text("address", MAX_NAME_BYTES)).collect()
}

fn decode_frames(r: &mut FieldReader<'_>) -> Result<Frames, MessageError> {
    let durable_lsn = r.lsn()?;
    let encoding = r.checked("encoding", FieldReader::byte, |tag| *tag <= 1)?;
    let good = |count: &u32| (1..=MAX_RUN_FRAMES).contains(&(*count as usize));
    let count = r.checked("number of frames", FieldReader::u32, good)? as usize;
    let run = if encoding == 0 { decode_plain(r, count)? } else { decode_compressed(r, count)? };
    Ok(Frames { durable_lsn, run })
}

fn decode_plain(r: &mut FieldReader<'_>, count: usize) -> Result<Vec<UnverifiedFrame>, MessageError> {
    let mut run = Vec::new();
    for _ in 0..count {
        let damaged = |fault| r.error(MessageFault::Frame(fault));
        let (frame, length) = UnverifiedFrame::parse(&r.peek(), 0).map_err(damaged)?;
        r.take(length)?;
        run.push(frame);
    }
    Ok(run)
}

fn decode_compressed(r: &mut FieldReader<'_>, count: usize) -> Result<Vec<UnverifiedFrame>, MessageError> {
    let mut headers = Vec::new();
    let mut total = 0;
    for _ in 0..count {
        let header = peek_header(r)?;
        total += header.body_len as usize;
        if total > MAX_RUN_BYTES {
            return Err(r.error(MessageFault::TooLong { length: total, limit: MAX_RUN_BYTES }));
        }
        r.take(FRAME_HEADER_BYTES)?;
        headers.push(header);
    }
    let damaged = r.error(MessageFault::Field("compressed bodies"));
    let compressed = r.rest();
    let bodies = zstd::bulk::decompress(&compressed, total).map_err(|_| damaged.clone())?;
    if bodies.len() != total {
        return Err(damaged);
    }
    let mut rest = bodies.as_slice();
    let mut run = Vec::with_capacity(headers.len());
    for header in &headers {
        let (body, after) = rest.split_at(header.body_len as usize);
        rest = after;
        run.push(Frame::from_parts(header, body).map_err(|error| r.error(MessageFault::Frame(error)))?);
    }
    Ok(run)
}

fn peek_header(r: &FieldReader<'_>) -> Result<FrameHeader, MessageError> {
    FrameHeader::parse(&r.peek()).map_err(|error| r.error(MessageFault::Frame(error)))
}

/// Messages without a part of free length are at most so long, in bytes.
const SMALL: usize = 512;
/// The largest list of addresses, in bytes.
const NAMES: usize = 1 + MAX_ADDRESSES * (2 + MAX_NAME_BYTES);
/// An epoch that may be there, in bytes.
const MAYBE_EPOCH: usize = 1 + 4 + 16;
/// The largest proof, in bytes.
/// Runs of at least so many bytes are compressed.
const COMPRESSED_FROM_BYTES: usize = 16 << 10;
const COMPRESSION_LEVEL: i32 = 1;

#[cfg(test)]
mod tests;
