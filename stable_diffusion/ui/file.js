/**
 * Looks into the bytes of an image file: what kind it is, and whether anything in it can be read in two ways.
 * Its name and type are never asked: they are often wrong. Decodes no pixels. Knows nothing of the page.
 */

const SIGNATURES = [ // of the kinds that people choose: name, offset, the first bytes as text
  ["PNG", 0, "\x89PNG"],
  ["JPEG", 0, "\xff\xd8\xff"],
  ["WebP", 8, "WEBP"],
  ["GIF", 0, "GIF8"],
  ["AVIF", 4, "ftypavi"],
  ["HEIC", 4, "ftyphe"],
  ["HEIC", 4, "ftypmif1"],
  ["HEIC", 4, "ftypmsf1"],
  ["JPEG XL", 0, "\xff\x0a"],
  ["JPEG XL", 4, "JXL "],
  ["TIFF", 0, "II*\0"],
  ["TIFF", 0, "MM\0*"],
  ["Photoshop", 0, "8BPS"],
  ["PDF", 0, "%PDF"],
];
const ENOUGH_FOR_MARKUP = 256;
const MAX_PIECES = 1000; // of a PNG; a server may refuse files with very many
const PNG_PIXELS = ["IHDR", "PLTE", "IDAT", "sRGB", "pHYs"];
const PNG_TEXT = ["tEXt", "iTXt"];
const PLAIN_TEXT = "parameters\0"; // how an image was generated: in the images of this server, and of others
const WEBP_PIXELS = ["VP8X", "VP8 ", "VP8L", "ALPH"];
const START_OF_SCAN = 0xda;
const BASELINE_FRAMES = [0xc0, 0xc1];
// Tables, JFIF's and Adobe's markers, comments. Not among them: EXIF, XMP, profiles, further images, progressive frames.
const JPEG_PIXELS = [...BASELINE_FRAMES, 0xc4, 0xdb, 0xdd, 0xe0, 0xee, 0xfe];

/** "PNG", "JPEG" and so on. null where it is none of the kinds above. */
export function kindOf(bytes) {
  return SIGNATURES.find(([, offset, text]) => textAt(bytes, offset, text.length) === text)?.[0] ?? null;
}

/** Whether it is text with tags, as SVG is: the one kind that a browser knows by its declared type only. */
export function isMarkup(bytes) {
  return new TextDecoder().decode(bytes.subarray(0, ENOUGH_FOR_MARKUP)).trimStart().startsWith("<");
}

/**
 * Whether every program sees the same pixels: a whole PNG, JPEG or WebP that holds nothing but pixels. Not so where there is EXIF
 * or XMP, which may turn the image and of which programs read one, the other or neither; a colour profile; more than one image;
 * a checksum that is wrong; or anything else that is not known here.
 */
export function isPlain(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const check = { PNG: isPlainPng, JPEG: isPlainJpeg, WebP: isPlainWebp }[kindOf(bytes)];
  return check?.(bytes, view) ?? false;
}

/** PNG, third edition, 5.3: a length, a type, that many bytes, a checksum of the last two. */
function isPlainPng(bytes, view) {
  let at = 8;
  for (let pieces = 0; pieces < MAX_PIECES && at + 12 <= bytes.length; pieces++) {
    const type = textAt(bytes, at + 4, 4);
    const end = at + 12 + view.getUint32(at);
    if (end > bytes.length || view.getUint32(end - 4) !== crc32(bytes.subarray(at + 4, end - 4))) return false;
    if (type === "IEND") return end === bytes.length;
    if (!PNG_PIXELS.includes(type) && !(PNG_TEXT.includes(type) && isPlainText(bytes, at, type))) return false;
    at = end;
  }
  return false;
}

function isPlainText(bytes, at, type) {
  const start = at + 8;
  const isCompressed = type === "iTXt" && bytes[start + PLAIN_TEXT.length] !== 0; // of any size when it is unpacked
  return textAt(bytes, start, PLAIN_TEXT.length) === PLAIN_TEXT && !isCompressed;
}

/** ITU-T T.81, B.1.1.4: segments that begin with FF, a marker and a length, up to the first scan. */
function isPlainJpeg(bytes, view) {
  let at = 2;
  while (at + 10 <= bytes.length && bytes[at] === 0xff) {
    const marker = bytes[at + 1];
    if (marker === START_OF_SCAN) return view.getUint16(bytes.length - 2) === 0xffd9;
    if (!JPEG_PIXELS.includes(marker)) return false;
    if (BASELINE_FRAMES.includes(marker) && ![1, 3].includes(bytes[at + 9])) return false; // CMYK
    at += 2 + view.getUint16(at + 2);
  }
  return false;
}

/** RFC 9649, 2.3 and 2.4: a type, a length, that many bytes, filled up to an even number. */
function isPlainWebp(bytes, view) {
  if (view.getUint32(4, true) + 8 !== bytes.length) return false;
  let at = 12;
  while (at + 8 <= bytes.length) {
    if (!WEBP_PIXELS.includes(textAt(bytes, at, 4))) return false;
    const length = view.getUint32(at + 4, true);
    at += 8 + length + (length % 2);
  }
  return at === bytes.length;
}

function textAt(bytes, offset, length) {
  return String.fromCharCode(...bytes.subarray(offset, offset + length));
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** As PNG and zlib compute it. */
function crc32(bytes) {
  let value = 0xffffffff;
  for (let at = 0; at < bytes.length; at++) value = CRC_TABLE[(value ^ bytes[at]) & 0xff] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}
